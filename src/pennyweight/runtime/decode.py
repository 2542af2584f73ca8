"""Token after token from a language model's program; numpy only."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from pennyweight.errors import FormatError, InputError
from pennyweight.program.ir import Array
from pennyweight.runtime.session import Session, load

KEY = "decoder"
STRIDE = 64  # places for keys and values at first


class Decoding:
    """A conversation with a program of `lower_decoder`: its keys and values, and what comes next.

    Args:
        session: of such a program.

    Raises:
        FormatError: if the program is none.
    """

    def __init__(self, session: Session) -> None:
        about = session.program.meta.get(KEY)
        keys = ("blocks", "heads", "width", "window")
        if not isinstance(about, dict) or not all(type(about.get(k)) is int and about[k] >= 0 for k in keys):
            raise FormatError(
                "the file holds no language model to decode with", hint="Write it with llm quantize --to dwt."
            )
        self.session = session
        self.about: dict[str, Any] = about
        self.window = int(about["window"])
        self.rounded = about.get("cache", "") == "int8"
        self._kept = self._room(STRIDE)  # keys and values, and of rounded ones the ranges
        self.count = 0

    def _room(self, places: int) -> list[Array]:
        about = self.about
        shape = (2, about["blocks"], about["heads"], places)
        if not self.rounded:
            return [np.zeros((*shape, about["width"]), np.float32)]
        return [np.zeros((*shape, about["width"]), np.uint8), np.zeros((*shape, 2), np.float32)]

    def begin(self) -> None:
        """Forget what was said."""
        self.count = 0

    @property
    def tokenizer(self) -> str:
        """Text of the tokenizer's `tokenizer.json`, empty where the file has none."""
        return str(self.about.get("tokenizer", ""))

    def step(self, ids: Array | list[int]) -> Array:
        """Take in tokens; the logits of what comes next, f32 [vocabulary].

        Raises:
            InputError: on no token, or more than the model's window holds.
        """
        given = np.asarray(ids, np.int64).reshape(1, -1)
        n = given.shape[1]
        if n == 0:
            raise InputError("there is no token to go on from")
        if self.window and self.count + n > self.window:
            raise InputError(
                f"{self.count + n} tokens, the model was made for {self.window}", hint="Begin anew."
            )
        if self.count + n > self._kept[0].shape[3]:
            whole = STRIDE << (-(-(self.count + n) // STRIDE) - 1).bit_length()
            step = max(STRIDE, whole // 4)  # at most a third of the room is empty when it has grown
            grown = self._room(-(-(self.count + n) // step) * step)
            for old, new in zip(self._kept, grown, strict=True):
                new[..., : self.count, :] = old[..., : self.count, :]
            self._kept = grown
        past, *ranges = self._kept
        logits, *found = self.session.run(given, past, np.array([self.count], np.int64), *ranges)
        for kept, new in zip(self._kept, found, strict=True):
            kept[..., self.count : self.count + n, :] = new.transpose(0, 1, 3, 2, 4)
        self.count += n
        next_: Array = logits[0]
        return next_

    def generate(
        self, ids: list[int], *, tokens: int = 64, temperature: float = 0.0, seed: int = 0
    ) -> Iterator[int]:
        """Go on from some tokens, one after another, until a token that ends the text.

        Args:
            ids: to take in first.
            tokens: to add at most.
            temperature: 0 takes the likeliest token.
            seed: of the choice.

        Raises:
            InputError: see `step`.
        """
        draw = np.random.default_rng(seed)
        ends = set(self.about.get("ends") or ())
        logits = self.step(ids)
        for i in range(tokens):
            if temperature > 0:
                p = np.exp((logits - logits.max()).astype(np.float64) / temperature)
                token = int(draw.choice(len(p), p=p / p.sum()))
            else:
                token = int(logits.argmax())
            yield token
            if token in ends or i == tokens - 1 or (self.window and self.count == self.window):
                return
            logits = self.step([token])


def load_decoding(path: str | os.PathLike[str], *, backend: str = "auto", threads: int = 0) -> Decoding:
    """A conversation with a `.dwt` file.

    Raises:
        FormatError: if the file breaks a promise, or holds no language model.
        OSError: if it cannot be opened.
    """
    return Decoding(load(path, backend=backend, threads=threads))

"""Programs as the words that `pw_plan_make` and `pw_model_constants` read: one call instead of hundreds."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

import numpy as np

from pennyweight.errors import KernelError
from pennyweight.program.ir import Array, Program, TensorType, resolve

DTYPES = {"f32": 0, "f16": 1, "bf16": 2, "u8": 3, "i8": 4, "u4": 5, "i32": 6, "i64": 7, "bool": 8, "i16": 9}
TEMPORARY, INPUT, CONSTANT = 0, 1, 3  # kinds of values
VALUE, OP, OUTPUT = 0, 1, 2  # what comes next
INTS, REALS, TEXT = 0, 1, 2  # kinds of attributes


class Sentences:
    """A program for fixed sizes, being written down; see `pw_plan_make` in pennyweight.h.

    Args:
        program: verified.
        types: of all its values, sizes bound.
        symbols: the sizes.
        constants: their numbers in the model, by name.
    """

    def __init__(
        self,
        program: Program,
        types: Mapping[str, TensorType],
        symbols: Mapping[str, int],
        constants: Mapping[str, int],
    ) -> None:
        self._types, self._constants = types, constants
        self._numbers: dict[str, int] = {}
        self._texts = _Texts()
        self._words: list[int] = []
        self._reals: list[float] = []
        words, texts, numbers = self._words, self._texts, self._numbers
        for index, name in enumerate(program.inputs):
            self._value(name, INPUT, index)
        for op in program.ops:
            inputs = [numbers[n] if n in numbers else self._constant(n) for n in op.inputs]
            outputs = [self._value(n, TEMPORARY, -1) for n in op.outputs]
            words += (
                OP,
                texts[op.kind],
                texts[op.site],
                len(inputs),
                *inputs,
                len(outputs),
                *outputs,
                len(op.attrs),
            )
            for key, value in resolve(op.attrs, symbols).items():
                kind = type(value)
                if kind is int or kind is bool:
                    words += (texts[key], INTS, 1, value)
                elif kind is list and set(map(type, value)) == _INT:
                    words += (texts[key], INTS, len(value), *value)
                else:
                    self._attribute(texts[key], value)
        for index, name in enumerate(program.outputs):
            words += (OUTPUT, numbers[name] if name in numbers else self._constant(name), index)

    def parts(self) -> tuple[Array, bytes, Array]:
        """Words, texts, reals.

        Raises:
            KernelError: on a number that 64 bits do not hold.
        """
        try:
            words = struct.pack(f"{len(self._words)}q", *self._words)  # three times as fast as numpy
            reals = np.array(self._reals, np.float64)
        except (OverflowError, struct.error) as error:
            raise KernelError("the engine refuses the program: a number is beyond 64 bits") from error
        return np.frombuffer(words, np.int64), b"".join(self._texts.encoded), reals

    def _value(self, name: str, kind: int, index: int) -> int:
        type_ = self._types[name]
        shape: Any = type_.shape  # sizes are bound
        self._words += (VALUE, kind, index, DTYPES[type_.dtype], len(shape), *shape)
        number = self._numbers[name] = len(self._numbers)
        return number

    def _constant(self, name: str) -> int:
        """The number of an operand that no op has made; -1 for none."""
        return self._value(name, CONSTANT, self._constants[name]) if name else -1

    def _attribute(self, name: int, value: Any) -> None:
        if isinstance(value, str):
            self._words += (name, TEXT, 1, self._texts[value])
            return
        values = value if isinstance(value, list | tuple) else [value]
        if any(isinstance(v, float) for v in values):
            first = len(self._reals)
            self._reals += values
            self._words += (name, REALS, len(values), *range(first, len(self._reals)))
        else:
            self._words += (name, INTS, len(values), *map(int, values))


_INT = {int}


class _Texts(dict[str, int]):
    """Where each text begins among all, one behind the other, each with a zero byte behind it."""

    def __init__(self) -> None:
        self.encoded: list[bytes] = []
        self._at = 0

    def __missing__(self, text: str) -> int:
        place = self[text] = self._at
        self.encoded.append(text.encode() + b"\0")
        self._at += len(self.encoded[-1])
        return place


def constant_words(program: Program) -> Array:
    """dtype, rank and dimensions of every constant, one behind the other."""
    words: list[int] = []
    for constant in program.constants.values():
        shape = constant.data.shape
        words += [DTYPES[constant.dtype], len(shape), *shape]
    return np.array(words, np.int64)

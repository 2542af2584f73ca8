"""Calibration and test text as token ids: from text, `.jsonl` or arrays on disk; never from a hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pennyweight.errors import InputError
from pennyweight.llm.directory import Directory
from pennyweight.llm.skeleton import transformers

ARRAYS = (".npy", ".npz", ".pt")


def tokenizer(directory: Directory) -> Any:
    """The tokenizer of a directory, None where it has none."""
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
    if not any((directory.path / n).is_file() for n in names):
        return None
    return transformers().AutoTokenizer.from_pretrained(str(directory.path), local_files_only=True)


def read_tokens(source: Path, directory: Directory) -> Tensor:
    """Token ids int64 [n] of a file.

    Args:
        source: `.txt` and other text; `.jsonl` of objects with "text" or a list of ids ("input_ids", "tokens"); `.npy`,
            `.npz` (its first array) or `.pt` with ids of any shape, which is flattened.
        directory: whose tokenizer reads text.

    Raises:
        InputError: if the file is missing, empty or holds no ids, or text where there is no tokenizer, or ids beyond
            the vocabulary.
    """
    if not source.is_file():
        raise InputError("there is no such file of text", site=str(source))
    ids = _array(source) if source.suffix in ARRAYS else _text(source, directory)
    if ids.numel() == 0:
        raise InputError("the file holds no token", site=source.name)
    vocabulary = int(directory.config.get("vocab_size") or 0)
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or (vocabulary and high >= vocabulary):
        raise InputError(
            f"token ids from {low} to {high} where the vocabulary has {vocabulary}", site=source.name,
            hint="Were they made by another tokenizer?",
        )  # fmt: skip
    return ids


def _array(source: Path) -> Tensor:
    try:
        if source.suffix == ".pt":
            found = torch.load(source, weights_only=True)
            ids = found if isinstance(found, Tensor) else torch.tensor(found)
        else:
            loaded = np.load(source, allow_pickle=False)
            values = loaded if isinstance(loaded, np.ndarray) else loaded[loaded.files[0]]
            ids = torch.from_numpy(np.ascontiguousarray(values).astype(np.int64))
            if not np.issubdtype(values.dtype, np.integer):
                raise InputError(f"an array of {values.dtype} holds no token ids", site=source.name)
    except (ValueError, OSError, RuntimeError, TypeError, IndexError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"no array of token ids: {str(error).splitlines()[0][:200]}", site=source.name
        ) from None
    if ids.is_floating_point() or ids.dtype == torch.bool:
        raise InputError(f"an array of {ids.dtype} holds no token ids", site=source.name)
    return ids.reshape(-1).long()


def _text(source: Path, directory: Directory) -> Tensor:
    try:
        text = source.read_text("utf8")
    except UnicodeDecodeError as error:
        raise InputError(f"the file is no UTF-8 text: {error}", site=source.name) from None
    pieces: list[str | list[int]] = []
    if source.suffix == ".jsonl":
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip():
                pieces.append(_record(line, f"{source.name}:{number}"))
    else:
        pieces.append(text)
    reader = tokenizer(directory) if any(isinstance(p, str) for p in pieces) else None
    if reader is None and any(isinstance(p, str) for p in pieces):
        raise InputError(
            "the model directory has no tokenizer to read text with", site=directory.path.name,
            hint="Give token ids: .npy, .pt, or .jsonl with input_ids.",
        )  # fmt: skip
    ids: list[int] = []
    for piece in pieces:
        ids += encode(reader, piece) if isinstance(piece, str) else piece
    return torch.tensor(ids, dtype=torch.int64)


def encode(reader: Any, text: str) -> list[int]:
    """Token ids of a text, with the marks that the tokenizer puts around it."""
    found: list[int] = reader(text, verbose=False)["input_ids"]
    return found


def _record(line: str, site: str) -> str | list[int]:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise InputError(f"a line is no JSON: {error}", site=site) from None
    if isinstance(value, dict):
        value = next((value[k] for k in ("text", "input_ids", "tokens", "content") if k in value), None)
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(type(v) is int for v in value):
        return value
    raise InputError(
        "a line holds neither text nor token ids", site=site, hint='{"text": "..."} or {"input_ids": [...]}.'
    )


def windows(ids: Tensor, length: int, count: int, seed: int, site: str = "") -> Tensor:
    """`count` stretches of `length` ids, int64 [count, length], from starts drawn without replacement where possible.

    Raises:
        InputError: if there is not one window of text.
    """
    room = len(ids) - length + 1
    if room < 1:
        raise InputError(
            f"the text has {len(ids)} tokens, one window needs {length}", site=site,
            hint=f"Give more text, or --window {max(1, len(ids))} at most.",
        )  # fmt: skip
    order = torch.Generator().manual_seed(seed)
    whole = len(ids) // length
    if whole >= count:  # windows that do not overlap
        starts = torch.randperm(whole, generator=order)[:count].sort().values * length
    else:
        starts = torch.randint(room, (count,), generator=order).sort().values
    return torch.stack([ids[s : s + length] for s in starts.tolist()])

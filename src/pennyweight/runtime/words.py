"""Programs as the words that `pw_plan_make` and `pw_model_constants` read: one call instead of hundreds."""

from __future__ import annotations

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
        self._places: dict[str, int] = {}
        self._texts: list[bytes] = []
        self._at = 0
        self._words: list[int] = []
        self._reals: list[float] = []
        for index, name in enumerate(program.inputs):
            self._value(name, INPUT, index)
        for op in program.ops:
            inputs = [self._number(n) if n else -1 for n in op.inputs]
            outputs = [self._value(n, TEMPORARY, -1) for n in op.outputs]
            kind, site = self._text(op.kind), self._text(op.site)
            self._words += (OP, kind, site, len(inputs), *inputs, len(outputs), *outputs, len(op.attrs))
            for key, value in resolve(op.attrs, symbols).items():
                self._attribute(key, value)
        for index, name in enumerate(program.outputs):
            self._words += [OUTPUT, self._number(name), index]

    def parts(self) -> tuple[Array, bytes, Array]:
        """Words, texts, reals.

        Raises:
            KernelError: on a number that 64 bits do not hold.
        """
        try:
            words, reals = np.array(self._words, np.int64), np.array(self._reals, np.float64)
        except OverflowError as error:
            raise KernelError("the engine refuses the program: a number is beyond 64 bits") from error
        return words, b"".join(self._texts), reals

    def _value(self, name: str, kind: int, index: int) -> int:
        type_ = self._types[name]
        shape = type_.ints
        self._words += (VALUE, kind, index, DTYPES[type_.dtype], len(shape), *shape)
        number = self._numbers[name] = len(self._numbers)
        return number

    def _number(self, name: str) -> int:
        found = self._numbers.get(name)
        return self._value(name, CONSTANT, self._constants[name]) if found is None else found

    def _text(self, value: str) -> int:
        found = self._places.get(value)
        if found is None:
            found = self._places[value] = self._at
            self._texts.append(value.encode() + b"\0")
            self._at += len(self._texts[-1])
        return found

    def _attribute(self, key: str, value: Any) -> None:
        name, kind = self._text(key), type(value)
        if kind is int or kind is bool:
            self._words += [name, INTS, 1, value]
        elif kind is float:
            self._words += [name, REALS, 1, len(self._reals)]
            self._reals.append(value)
        elif isinstance(value, str):
            self._words += [name, TEXT, 1, self._text(value)]
        else:
            values = value if kind in (list, tuple) else [value]
            if any(isinstance(v, float) for v in values):
                first = len(self._reals)
                self._reals += values
                self._words += [name, REALS, len(values), *range(first, len(self._reals))]
            else:
                self._words += [name, INTS, len(values), *map(int, values)]


def constant_words(program: Program) -> Array:
    """dtype, rank and dimensions of every constant, one behind the other."""
    words: list[int] = []
    for constant in program.constants.values():
        shape = constant.data.shape
        words += [DTYPES[constant.dtype], len(shape), *shape]
    return np.array(words, np.int64)

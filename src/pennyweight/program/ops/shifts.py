"""From accumulators to codes by shifts alone, where all scales are powers of two."""

from __future__ import annotations

from typing import Any

import numpy as np

from pennyweight.program.ir import Array, TensorType
from pennyweight.program.ops import Attrs, Operands, Types, array, define, require, want

LEAST, GREATEST = -8, 23  # shifts: two of them apart move 32 bits by at most 31, which 64 hold


def shifted(total: Any, shift: int) -> Array:
    """`total / 2^shift`, half to even; times `2^-shift` where the shift is negative. int64."""
    total = np.asarray(total, np.int64)
    if shift <= 0:
        up: Array = np.left_shift(total, -shift)
        return up
    floor = total >> shift
    rest = total - (floor << shift)
    half = 1 << (shift - 1)
    out: Array = floor + ((rest > half) | ((rest == half) & ((floor & 1) == 1)))
    return out


def codes(total: Array, a: Attrs) -> Array:
    """`clamp(total + zero, lo, hi)`, u8."""
    out: Array = np.clip(total + a["zero"], a["lo"], a["hi"]).astype(np.uint8)
    return out


@define("requant_shift", "shift zero lo hi")
class RequantShift:
    """`q = clamp(acc / 2^shift + zero, lo, hi)`, half to even, in integers. i32 [...] -> u8 [...]."""

    @staticmethod
    def infer(types: Types, attrs: Attrs) -> list[TensorType]:
        """Same shape."""
        return [TensorType("u8", want(types[0], "i32"))]

    @staticmethod
    def run(x: Operands, a: Attrs) -> list[Array]:
        """See the class."""
        return [codes(shifted(array(x[0]), a["shift"]), a)]


@define("requant_add_shift", "shift r_zero r_shift zero lo hi")
class RequantAddShift:
    """An accumulator plus a residual on codes, rounded once, half to even, in integers.

        q = clamp(acc / 2^shift + (r - r_zero) / 2^r_shift + zero, lo, hi)

    acc i32 [...], r u8 [...] -> u8 [...].
    """

    @staticmethod
    def infer(types: Types, attrs: Attrs) -> list[TensorType]:
        """Same shape."""
        shape = want(types[0], "i32")
        require(want(types[1], "u8") == shape, "accumulator and residual differ in shape")
        return [TensorType("u8", shape)]

    @staticmethod
    def run(x: Operands, a: Attrs) -> list[Array]:
        """See the class."""
        deepest = max(a["shift"], a["r_shift"])
        total = shifted(array(x[0]), a["shift"] - deepest)
        total = total + shifted(array(x[1]).astype(np.int64) - a["r_zero"], a["r_shift"] - deepest)
        return [codes(shifted(total, deepest), a)]

"""Stored codes that name levels of a table."""

from __future__ import annotations

from typing import Any

import numpy as np

from pennyweight.program.ir import Array, TensorType
from pennyweight.program.ops import Attrs, Operands, Types, array, define, require, want


@define("decode_levels", "bits shape")
class DecodeLevels:
    """`levels[code] * scale`, one scale per row or group, as floats of a shape [rows, ...].

    codes u8 [rows, n], or of 4 bits u4 [rows, ceil(n / 2)] (low nibble first); levels f32 [2^bits]; scale f32
    [rows or 1, groups] -> f32 shape.
    """

    @staticmethod
    def infer(types: Types, attrs: Attrs) -> list[TensorType]:
        """The shape."""
        shape, bits = tuple(attrs["shape"]), attrs["bits"]
        n = int(np.prod(shape[1:]))
        require(bits in (4, 8), f"{bits} bits")
        codes = want(types[0], "u8" if bits == 8 else "u4")
        require(codes == (shape[0], n if bits == 8 else -(-n // 2)), f"codes {codes} do not hold {shape}")
        require(want(types[1], "f32") == (1 << bits,), "there is not one level for every code")
        scale = want(types[2], "f32")
        require(len(scale) == 2 and scale[0] in (1, shape[0]), f"scales {scale} for {shape[0]} rows")
        require(scale[1] > 0 and n % scale[1] == 0, f"{scale[1]} groups do not divide {n}")
        return [TensorType("f32", shape)]

    @staticmethod
    def run(x: Operands, a: Attrs) -> list[Array]:
        """See the class."""
        return [decoded_levels(x[0], x[1], x[2], a)]


def decoded_levels(codes: Any, levels: Any, scale: Any, a: Attrs) -> Array:
    """See `DecodeLevels`."""
    c, s = array(codes), array(scale)
    n = int(np.prod(a["shape"][1:]))
    if a["bits"] == 4:
        c = np.stack([c & 15, c >> 4], -1).reshape(len(c), -1)[:, :n]
    w = array(levels)[c].reshape(len(c), s.shape[1], -1) * s[..., None]
    out: Array = w.reshape(a["shape"])
    return out

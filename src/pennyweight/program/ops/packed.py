"""Codes of 1, 2, 4 or 8 bits that lie packed in bytes, and the integers they stand for."""

from __future__ import annotations

import numpy as np

from pennyweight.program.ir import Array, TensorType
from pennyweight.program.ops import Attrs, Operands, Types, array, define, require, want


@define("unpack", "bits shape")
class Unpack:
    """`y[o, i] = table[code[o, i]]`: stored codes, several a byte, to the weight [O, ...] of an integer product.

    codes u8 [O, ceil(n * bits / 8)], n the entries of a row, the first in the low bits; table i8 [2^bits] -> i8 shape,
    or i16 [2^bits] -> i16 shape; of 8 bits i16 alone. Beside a table of i8 there may be zero i8 [O], the zero points of
    the rows: `y[o, i] = clamp(table[code[o, i]] - zero[o], -127, 127)`.
    """

    @staticmethod
    def infer(types: Types, attrs: Attrs) -> list[TensorType]:
        """The shape."""
        codes, table = want(types[0], "u8"), want(types[1], "i8", "i16")
        dtype: str = types[1].dtype
        shape, bits = tuple(attrs["shape"]), attrs["bits"]
        require(bits in (1, 2, 4) or (bits == 8 and dtype == "i16"), f"{bits} bits of {dtype}")
        require(len(shape) > 0, "a weight has rows")
        require(table == (1 << bits,), f"a table of {table} entries does not fit {bits} bits")
        n = int(np.prod(shape[1:]))
        require(codes == (shape[0], -(-n * bits // 8)), f"codes {codes} do not hold {shape} at {bits} bits")
        if types[2:]:
            require(
                dtype == "i8" and want(types[2], "i8") == (shape[0],), "zero points are i8, one for each row"
            )
        return [TensorType(dtype, shape)]

    @staticmethod
    def run(x: Operands, a: Attrs) -> list[Array]:
        """See the class."""
        codes, bits, shape = array(x[0]), a["bits"], a["shape"]
        shifts = np.arange(0, 8, bits, dtype=np.uint8)
        places = (codes[..., None] >> shifts & np.uint8((1 << bits) - 1)).reshape(len(codes), -1)
        levels = array(x[1])[places[:, : int(np.prod(shape[1:]))]]
        if x[2:]:
            apart = levels.astype(np.int16) - array(x[2])[:, None]
            levels = apart.clip(-127, 127).astype(np.int8)
        return [levels.reshape(shape)]

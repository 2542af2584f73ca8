"""Integer products whose weights have a scale for every group of inputs: exact in int32 group by group."""

from __future__ import annotations

import numpy as np

from pennyweight.program.ir import Array, TensorType
from pennyweight.program.ops import Attrs, Operands, Types, array, define, real, require, want
from pennyweight.program.ops.real_products import check_scales, codes_shape, unpacked

F32, F64 = np.float32, np.float64


@define("linear_grouped", "bits n")
class LinearGrouped:
    """A linear layer on codes ranged at run time, with weights of one scale per group of inputs.

        acc_g = sum_{i in g} (x_i - z) * w_i,   t = sum_g float32(acc_g) * sw_g  (g ascending, from 0)
        y = t * sx + bias

    Every step is float32, one rounding each. x u8 [..., n], codes i8 [O, n] or u4 [O, ceil(n / 2)] (low nibble first,
    two's complement), sw f32 or f16 [O or 1, groups], z i32 [..., 1] or [1], sx f32 alike, bias f32 [O] or absent
    -> f32 [..., O].
    """

    @staticmethod
    def infer(types: Types, attrs: Attrs) -> list[TensorType]:
        """[..., O]."""
        x, n = want(types[0], "u8"), attrs["n"]
        rows = codes_shape(types[1], attrs["bits"], n)
        require(len(x) > 0 and x[-1] == n and n > 0, f"x {x} does not fit rows of {n}")
        check_scales(types[2], None, rows, n, "f16")
        zero = want(types[3], "i32")
        require(zero in ((1,), (*x[:-1], 1)), f"run-time zero points have shape {zero}")
        require(want(types[4], "f32") == zero, "run-time scales and zero points differ in shape")
        if len(types) > 5 and types[5] is not None:
            require(want(types[5], "f32") == (rows,), "the bias does not fit the outputs")
        return [TensorType("f32", (*x[:-1], rows))]

    @staticmethod
    def run(x: Operands, a: Attrs) -> list[Array]:
        """See the class."""
        q = array(x[0]).astype(F64) - array(x[3])
        w, scale = unpacked(x[1], a["bits"], a["n"]).astype(F64), real(x[2])
        size = a["n"] // scale.shape[1]
        total = np.zeros((*q.shape[:-1], len(w)), F32)
        for g in range(scale.shape[1]):
            part = slice(g * size, (g + 1) * size)
            total = total + (q[..., part] @ w[:, part].T).astype(F32) * scale[:, g]
        y = total * array(x[4])
        return [y + real(x[5]) if len(x) > 5 and x[5] is not None else y]

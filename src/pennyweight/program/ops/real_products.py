"""Float products, stored weights decoded where needed. Sums may be ordered differently by an engine."""

from __future__ import annotations

from typing import Any

import numpy as np

from pennyweight.program.ir import Array, TensorType
from pennyweight.program.ops import Attrs, Operands, Types, array, define, real, require, want
from pennyweight.program.ops.movement import checked_index
from pennyweight.program.ops.products import conv_type, convolve, matmul_type, pad_space

REALS = ("f32", "f16", "bf16")


def factors(x: Any, w: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of activations, f32 or bf16, and weights; bf16 multiplies bf16."""
    shapes = want(x, "f32", "bf16"), want(w, *REALS)
    require(x.dtype != "bf16" or w.dtype == "bf16", f"activations are bf16, the weight is {w.dtype}")
    return shapes


@define("conv_f32", "stride pads dilation groups", exact=False)
class ConvF32:
    """`y = conv(x, w) + bias`. x f32 [N, *space, C], w real [O, C / groups, *kernel] -> f32 [N, *out, O].

    x may be bf16 where w is: products of such numbers are exact in f32, which they are summed in.
    """

    @staticmethod
    def infer(types: Types, attrs: Attrs) -> list[TensorType]:
        """[N, *out, O]."""
        x, weight = factors(types[0], types[1])
        if len(types) > 2 and types[2] is not None:
            require(want(types[2], "f32") == (weight[0],), "the bias does not fit the outputs")
        return [TensorType("f32", conv_type(x, weight, attrs))]

    @staticmethod
    def run(x: Operands, a: Attrs) -> list[Array]:
        """See the class."""
        y = convolve(pad_space(real(x[0]), a["pads"], 0.0), real(x[1]), a)
        return [y + real(x[2]) if len(x) > 2 and x[2] is not None else y]


@define("linear_f32", exact=False)
class LinearF32:
    """`y = x w^T + bias`. x f32 [..., I], w f32, f16 or bf16 [O, I], bias f32 [O] or absent -> f32 [..., O].

    x may be bf16 where w is.
    """

    @staticmethod
    def infer(types: Types, attrs: Attrs) -> list[TensorType]:
        """[..., O]."""
        x, weight = factors(types[0], types[1])
        require(len(weight) == 2 and len(x) > 0 and x[-1] == weight[1], f"x {x} does not fit w {weight}")
        if len(types) > 2 and types[2] is not None:
            require(want(types[2], "f32") == (weight[0],), "the bias does not fit the outputs")
        return [TensorType("f32", (*x[:-1], weight[0]))]

    @staticmethod
    def run(x: Operands, a: Attrs) -> list[Array]:
        """See the class."""
        y = real(x[0]) @ real(x[1]).T
        return [y + real(x[2]) if len(x) > 2 and x[2] is not None else y]


@define("matmul_f32", "transpose_b", exact=False)
class MatmulF32:
    """`y = a b`, leading axes broadcast. Both f32 or both bf16, [..., M, K], [..., K, N] -> f32 [..., M, N]."""

    @staticmethod
    def infer(types: Types, attrs: Attrs) -> list[TensorType]:
        """[..., M, N]."""
        a, b = want(types[0], "f32", "bf16"), want(types[1], "f32", "bf16")
        require(types[0].dtype == types[1].dtype, f"operands are {types[0].dtype} and {types[1].dtype}")
        return [TensorType("f32", matmul_type(a, b, attrs["transpose_b"]))]

    @staticmethod
    def run(x: Operands, a: Attrs) -> list[Array]:
        """See the class."""
        b = real(x[1])
        return [real(x[0]) @ (b.swapaxes(-1, -2) if a["transpose_b"] else b)]


def codes_shape(kind: Any, bits: int, n: int) -> int:
    """Rows of stored codes [rows, n] (u8 nibble pairs [rows, ceil(n / 2)] at 4 bits); checks the rest."""
    shape = want(kind, "i8" if bits == 8 else "u4")
    require(bits in (4, 8), f"{bits} bits")
    require(
        len(shape) == 2 and shape[1] == (n if bits == 8 else -(-n // 2)),
        f"codes {shape} do not hold rows of {n}",
    )
    return shape[0]


def check_scales(scale: Any, zero: Any, rows: int, n: int, *dtypes: str) -> None:
    """Check scales [rows or 1, groups] and zero points alike."""
    shape = want(scale, "f32", *dtypes)
    require(len(shape) == 2 and shape[0] in (1, rows), f"scales {shape} for {rows} rows")
    require(shape[1] > 0 and n % shape[1] == 0, f"{shape[1]} groups do not divide {n}")
    require(zero is None or want(zero, "f32") == shape, "zero points do not fit the scales")


def unpacked(codes: Any, bits: int, n: int) -> Array:
    """Stored codes as i8 [rows, n]."""
    c = array(codes)
    if bits == 4:
        pairs = np.stack([c & 15, c >> 4], -1).reshape(len(c), -1)[:, :n]
        c = (pairs ^ 8).astype(np.int8) - 8
    return c


def decoded(codes: Any, scale: Any, zero: Any, bits: int, n: int) -> Array:
    """`(code - zero) * scale`, f32 [rows, n]."""
    c, s = unpacked(codes, bits, n), array(scale)
    w = c.astype(np.float32).reshape(len(c), s.shape[1], -1)
    if zero is not None:
        w = w - array(zero)[..., None]
    out: Array = (w * s[..., None]).reshape(len(c), -1)
    return out


@define("linear_w", "bits n", exact=False)
class LinearW:
    """Float activations, stored codes: `y = x decode(codes)^T + bias`, `decode = (code - zero) * scale` per group.

    x f32 [..., n], codes i8 [O, n] or u4 [O, ceil(n / 2)] (low nibble first, two's complement),
    scale f32 [O or 1, groups], zero f32 alike or absent, bias f32 [O] or absent -> f32 [..., O].
    """

    @staticmethod
    def infer(types: Types, attrs: Attrs) -> list[TensorType]:
        """[..., O]."""
        x = want(types[0], "f32")
        rows = codes_shape(types[1], attrs["bits"], attrs["n"])
        require(len(x) > 0 and x[-1] == attrs["n"], f"x {x} does not fit rows of {attrs['n']}")
        check_scales(types[2], types[3] if len(types) > 3 else None, rows, attrs["n"])
        if len(types) > 4 and types[4] is not None:
            require(want(types[4], "f32") == (rows,), "the bias does not fit the outputs")
        return [TensorType("f32", (*x[:-1], rows))]

    @staticmethod
    def run(x: Operands, a: Attrs) -> list[Array]:
        """See the class."""
        y = array(x[0]) @ decoded(x[1], x[2], x[3] if len(x) > 3 else None, a["bits"], a["n"]).T
        return [y + real(x[4]) if len(x) > 4 and x[4] is not None else y]


@define("decode", "bits shape")
class Decode:
    """Stored codes to floats of a shape [rows, ...]: `(code - zero) * scale`. codes, scale, zero as in linear_w."""

    @staticmethod
    def infer(types: Types, attrs: Attrs) -> list[TensorType]:
        """The shape."""
        shape = tuple(attrs["shape"])
        n = int(np.prod(shape[1:]))
        rows = codes_shape(types[0], attrs["bits"], n)
        require(shape[0] == rows, f"{rows} rows do not make {shape}")
        check_scales(types[1], types[2] if len(types) > 2 else None, rows, n)
        return [TensorType("f32", shape)]

    @staticmethod
    def run(x: Operands, a: Attrs) -> list[Array]:
        """See the class."""
        n = int(np.prod(a["shape"][1:]))
        return [decoded(x[0], x[1], x[2] if len(x) > 2 else None, a["bits"], n).reshape(a["shape"])]


@define("embedding", "bits n")
class Embedding:
    """Decoded rows of a table: `y = decode(codes[ids])`. ids i64 [*m], the rest as in linear_w -> f32 [*m, n]."""

    @staticmethod
    def infer(types: Types, attrs: Attrs) -> list[TensorType]:
        """[*m, n]."""
        ids = want(types[0], "i64")
        rows = codes_shape(types[1], attrs["bits"], attrs["n"])
        check_scales(types[2], types[3] if len(types) > 3 else None, rows, attrs["n"])
        return [TensorType("f32", (*ids, attrs["n"]))]

    @staticmethod
    def run(x: Operands, a: Attrs) -> list[Array]:
        """See the class."""
        codes, scale = array(x[1]), array(x[2])
        ids = checked_index(array(x[0]), len(codes))
        flat = ids.reshape(-1)
        zero = array(x[3]) if len(x) > 3 and x[3] is not None else None
        row_scale = scale[flat] if len(scale) > 1 else np.broadcast_to(scale, (len(flat), scale.shape[1]))
        if zero is not None:
            zero = zero[flat] if len(zero) > 1 else np.broadcast_to(zero, row_scale.shape)
        return [decoded(codes[flat], row_scale, zero, a["bits"], a["n"]).reshape(*ids.shape, a["n"])]

"""Between floats and codes, and from accumulators to codes."""

from __future__ import annotations

from typing import Any

import numpy as np

from pennyweight.errors import VerifyError
from pennyweight.program.ir import Array, TensorType
from pennyweight.program.ops import Attrs, Operands, Types, array, broadcast, define, real, require, want

F32 = np.float32
TINY = np.float32(1e-30)


def clamp_codes(t: Array, zero: int, lo: int, hi: int) -> Array:
    """`clamp(rint(t) + zero, lo, hi)` to uint8; NaN gives lo."""
    t = np.rint(t) + F32(zero)
    return np.fmin(np.fmax(t, F32(lo)), F32(hi)).astype(np.uint8)


def per_channel(kind: Any, channels: int, what: str) -> None:
    """Check a constant of one element, or one per channel."""
    shape = want(kind, "f32")
    if shape not in ((1,), (channels,)):
        raise VerifyError(f"{what} has shape {shape}, wanted (1,) or ({channels},)")


@define("quantize", "scale zero lo hi")
class Quantize:
    """`q = clamp(rint(x * r) + zero, lo, hi)`, `r = float32(1 / scale)`. f32 [...] -> u8 [...]."""

    @staticmethod
    def infer(types: Types, attrs: Attrs) -> list[TensorType]:
        """Same shape."""
        return [TensorType("u8", want(types[0], "f32"))]

    @staticmethod
    def run(x: Operands, a: Attrs) -> list[Array]:
        """See the class."""
        r = F32(1) / F32(a["scale"])
        return [clamp_codes(array(x[0]) * r, a["zero"], a["lo"], a["hi"])]


@define("dequantize", "scale zero")
class Dequantize:
    """`x = float32(q - zero) * scale`. u8 [...] -> f32 [...]."""

    @staticmethod
    def infer(types: Types, attrs: Attrs) -> list[TensorType]:
        """Same shape."""
        return [TensorType("f32", want(types[0], "u8"))]

    @staticmethod
    def run(x: Operands, a: Attrs) -> list[Array]:
        """See the class."""
        return [(array(x[0]).astype(F32) - F32(a["zero"])) * F32(a["scale"])]


@define("dynamic_quantize", "per_token")
class DynamicQuantize:
    """Range and codes at run time, per row of the last axis or for the whole tensor.

        s = (hi - lo) * float32(1 / 255)   (1 if below 1e-30),   z = clamp(rint(-lo * r), 0, 255),   r = 1 / s
        q = clamp(rint(x * r) + z, 0, 255),   with lo <= 0 <= hi

    f32 [..., n] -> u8 [..., n], scale f32 [..., 1], zero i32 [..., 1]; scale and zero are [1] for the whole tensor.
    """

    @staticmethod
    def infer(types: Types, attrs: Attrs) -> list[TensorType]:
        """Codes, scale, zero."""
        shape = want(types[0], "f32")
        outer = (*shape[:-1], 1) if attrs["per_token"] else (1,)
        return [TensorType("u8", shape), TensorType("f32", outer), TensorType("i32", outer)]

    @staticmethod
    def run(x: Operands, a: Attrs) -> list[Array]:
        """See the class."""
        v = array(x[0])
        if a["per_token"]:
            lo, hi = v.min(-1, keepdims=True), v.max(-1, keepdims=True)
        else:
            lo, hi = v.min(initial=0.0).reshape(1), v.max(initial=0.0).reshape(1)
        lo, hi = np.minimum(lo, F32(0)), np.maximum(hi, F32(0))
        scale = (hi - lo) * (F32(1) / F32(255))
        scale = np.where(scale < TINY, F32(1), scale).astype(F32)
        r = F32(1) / scale
        zero = np.fmin(np.fmax(np.rint(-lo * r), F32(0)), F32(255))
        codes = np.fmin(np.fmax(np.rint(v * r) + zero, F32(0)), F32(255)).astype(np.uint8)
        return [codes, scale, zero.astype(np.int32)]


@define("requant", "zero lo hi")
class Requant:
    """`q = clamp(rint(float32(acc) * m) + zero, lo, hi)`. acc i32 [..., C], m f32 [C] or [1] -> u8 [..., C]."""

    @staticmethod
    def infer(types: Types, attrs: Attrs) -> list[TensorType]:
        """Same shape."""
        shape = want(types[0], "i32")
        per_channel(types[1], shape[-1] if shape else 1, "multiplier")
        return [TensorType("u8", shape)]

    @staticmethod
    def run(x: Operands, a: Attrs) -> list[Array]:
        """See the class."""
        return [clamp_codes(array(x[0]).astype(F32) * real(x[1]), a["zero"], a["lo"], a["hi"])]


@define("requant_add", "r_zero r_multiplier zero lo hi")
class RequantAdd:
    """An accumulator plus a residual on codes.

        t = float32(acc) * m,   u = float32(r - r_zero) * r_multiplier,   q = clamp(rint(t + u) + zero, lo, hi)

    acc i32 [..., C], m f32 [C] or [1], r u8 [..., C] -> u8 [..., C].
    """

    @staticmethod
    def infer(types: Types, attrs: Attrs) -> list[TensorType]:
        """Same shape."""
        shape = want(types[0], "i32")
        per_channel(types[1], shape[-1], "multiplier")
        require(want(types[2], "u8") == shape, "accumulator and residual differ in shape")
        return [TensorType("u8", shape)]

    @staticmethod
    def run(x: Operands, a: Attrs) -> list[Array]:
        """See the class."""
        t = array(x[0]).astype(F32) * real(x[1])
        u = (array(x[2]).astype(F32) - F32(a["r_zero"])) * F32(a["r_multiplier"])
        return [clamp_codes(t + u, a["zero"], a["lo"], a["hi"])]


@define("rescale")
class Rescale:
    """An accumulator to float: `t = float32(acc)`, `t = t * row` (if given), `t = t * m`, `t = t + bias` (if given).

    acc i32 [..., C], m f32 [C] or [1], bias f32 [C], row f32 [..., 1] or [1] -> f32 [..., C].
    """

    @staticmethod
    def infer(types: Types, attrs: Attrs) -> list[TensorType]:
        """Same shape."""
        shape = want(types[0], "i32")
        per_channel(types[1], shape[-1] if shape else 1, "multiplier")
        if len(types) > 2 and types[2] is not None:
            per_channel(types[2], shape[-1], "bias")
        if len(types) > 3 and types[3] is not None:
            row = want(types[3], "f32")
            require(row in ((1,), (*shape[:-1], 1)), f"row scales have shape {row}")
        return [TensorType("f32", shape)]

    @staticmethod
    def run(x: Operands, a: Attrs) -> list[Array]:
        """See the class."""
        t = array(x[0]).astype(F32)
        if len(x) > 3 and x[3] is not None:
            t = t * array(x[3])
        t = t * real(x[1])
        if len(x) > 2 and x[2] is not None:
            t = t + real(x[2])
        return [t]


@define("add_q", "a_zero a_multiplier b_zero b_multiplier zero lo hi")
class AddQ:
    """Sum of codes.

        t = float32(a - a_zero) * a_multiplier,  u = float32(b - b_zero) * b_multiplier,
        q = clamp(rint(t + u) + zero, lo, hi)

    u8, u8 -> u8, numpy broadcasting.
    """

    @staticmethod
    def infer(types: Types, attrs: Attrs) -> list[TensorType]:
        """Broadcast shape."""
        return [TensorType("u8", broadcast(want(types[0], "u8"), want(types[1], "u8")))]

    @staticmethod
    def run(x: Operands, a: Attrs) -> list[Array]:
        """See the class."""
        t = (array(x[0]).astype(F32) - F32(a["a_zero"])) * F32(a["a_multiplier"])
        u = (array(x[1]).astype(F32) - F32(a["b_zero"])) * F32(a["b_multiplier"])
        return [clamp_codes(t + u, a["zero"], a["lo"], a["hi"])]


@define("mul_q", "a_zero b_zero multiplier zero lo hi")
class MulQ:
    """Product of codes: `q = clamp(rint(float32((a - a_zero) * (b - b_zero)) * multiplier) + zero, lo, hi)`.

    u8, u8 -> u8, numpy broadcasting.
    """

    @staticmethod
    def infer(types: Types, attrs: Attrs) -> list[TensorType]:
        """Broadcast shape."""
        return [TensorType("u8", broadcast(want(types[0], "u8"), want(types[1], "u8")))]

    @staticmethod
    def run(x: Operands, a: Attrs) -> list[Array]:
        """See the class."""
        left = array(x[0]).astype(np.int32) - a["a_zero"]
        right = array(x[1]).astype(np.int32) - a["b_zero"]
        t = (left * right).astype(F32) * F32(a["multiplier"])
        return [clamp_codes(t, a["zero"], a["lo"], a["hi"])]


@define("affine_q", "in_zero zero lo hi")
class AffineQ:
    """Per-channel affine map of codes: `t = float32(q - in_zero) * m`, `t = t + b`, `clamp(rint(t) + zero, lo, hi)`.

    q u8 [..., C], m f32 [C], b f32 [C] -> u8 [..., C].
    """

    @staticmethod
    def infer(types: Types, attrs: Attrs) -> list[TensorType]:
        """Same shape."""
        shape = want(types[0], "u8")
        per_channel(types[1], shape[-1], "multiplier")
        per_channel(types[2], shape[-1], "offset")
        return [TensorType("u8", shape)]

    @staticmethod
    def run(x: Operands, a: Attrs) -> list[Array]:
        """See the class."""
        t = (array(x[0]).astype(F32) - F32(a["in_zero"])) * real(x[1])
        t = t + real(x[2])
        return [clamp_codes(t, a["zero"], a["lo"], a["hi"])]


@define("table")
class Table:
    """Any function of one code: `y = lut[q]`. u8 [...], lut u8 or f32 [256] -> dtype of lut [...]."""

    @staticmethod
    def infer(types: Types, attrs: Attrs) -> list[TensorType]:
        """Same shape."""
        require(want(types[1], "u8", "f32") == (256,), "a table has 256 entries")
        return [TensorType(types[1].dtype, want(types[0], "u8"))]

    @staticmethod
    def run(x: Operands, a: Attrs) -> list[Array]:
        """See the class."""
        return [array(x[1])[array(x[0])]]

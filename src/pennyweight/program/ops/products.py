"""Integer products: convolution, linear, matrix product, attention; exact in int32, computed here in float64."""

from __future__ import annotations

from typing import Any

import numpy as np

from pennyweight.errors import VerifyError
from pennyweight.program.ir import Array, TensorType
from pennyweight.program.ops import Attrs, Operands, Types, array, broadcast, define, require, want
from pennyweight.program.ops.functions import exp
from pennyweight.program.ops.normalize import lane_sum

F32, F64 = np.float32, np.float64


def window_sizes(
    size: tuple[int, ...], kernel: Any, stride: Any, pads: Any, dilation: Any
) -> tuple[int, ...]:
    """Spatial sizes of a convolution's result; `pads` is [begin..., end...]."""
    dims = len(size)
    out = []
    for i, n in enumerate(size):
        span = dilation[i] * (kernel[i] - 1) + 1
        have = n + pads[i] + pads[dims + i] - span
        if have < 0:
            raise VerifyError(f"the window of {span} is larger than the padded size {have + span}")
        out.append(have // stride[i] + 1)
    return tuple(out)


def windows(x: Array, kernel: Any, stride: Any, dilation: Any) -> Array:
    """[N, *space, C], already padded, to a view [N, *out, C, *kernel]."""
    dims = len(kernel)
    span = tuple(d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True))
    view = np.lib.stride_tricks.sliding_window_view(x, span, axis=tuple(range(1, 1 + dims)))
    index = (slice(None), *(slice(None, None, s) for s in stride), slice(None))
    picked: Array = view[index + tuple(slice(None, None, d) for d in dilation)]
    return picked


def pad_space(x: Array, pads: Any, value: Any) -> Array:
    """Pad the spatial axes of [N, *space, C] with [begin..., end...]."""
    dims = len(pads) // 2
    widths = [(0, 0), *((pads[i], pads[dims + i]) for i in range(dims)), (0, 0)]
    return np.pad(x, widths, constant_values=value)


def convolve(x: Array, weight: Array, attrs: Attrs) -> Array:
    """Padded x [N, *space, C] and weight [O, C / groups, *kernel] -> [N, *out, O], dtype of the inputs."""
    groups, out_channels = attrs["groups"], weight.shape[0]
    patches = windows(x, weight.shape[2:], attrs["stride"], attrs["dilation"])
    lead = patches.shape[: x.ndim - 1]
    channels = x.shape[-1] // groups
    rows = int(np.prod(lead))
    patches = patches.reshape(*lead, groups, channels, *weight.shape[2:])
    patches = np.moveaxis(patches, x.ndim - 1, 0).reshape(
        groups, rows, channels * int(np.prod(weight.shape[2:]))
    )
    kernels = weight.reshape(groups, out_channels // groups, -1)
    y = np.matmul(patches, kernels.transpose(0, 2, 1))  # [groups, rows, O / groups]
    out: Array = np.moveaxis(y, 0, 1).reshape(*lead, out_channels)
    return out


def conv_type(x: tuple[int, ...], weight: tuple[int, ...], attrs: Attrs) -> tuple[int, ...]:
    """Result shape of a convolution."""
    dims = len(weight) - 2
    if dims not in (1, 2, 3) or len(x) != dims + 2:
        raise VerifyError(f"a weight of rank {len(weight)} does not fit an input of {x}")
    stride, pads, dilation, groups = attrs["stride"], attrs["pads"], attrs["dilation"], attrs["groups"]
    if (len(stride), len(pads), len(dilation)) != (dims, 2 * dims, dims):
        raise VerifyError(f"stride, pads, dilation have not {dims}, {2 * dims}, {dims} entries")
    require(min(stride) > 0 and min(dilation) > 0, "stride and dilation must be positive")
    require(min(pads) >= 0, "pads must not be negative")
    if groups <= 0 or x[-1] != weight[1] * groups:
        raise VerifyError(f"{x[-1]} channels do not fit a weight {weight} in {groups} groups")
    if weight[0] % groups:
        raise VerifyError(f"{weight[0]} outputs do not split into {groups} groups")
    space = window_sizes(x[1:-1], weight[2:], stride, pads, dilation)
    return (x[0], *space, weight[0])


@define("conv", "zero stride pads dilation groups")
class Conv:
    """`acc = sum (x - z) * w + bias`, padding with code z; z is the attribute, or a run-time operand.

    x u8 [N, *space, C], w i8 or i16 [O, C / groups, *kernel], bias i32 [O] or absent, z i32 [1] or absent
    -> i32 [N, *out, O]. pads: [begin..., end...]. That |acc| stays below 2^31 is the maker's duty.
    """

    @staticmethod
    def infer(types: Types, attrs: Attrs) -> list[TensorType]:
        """[N, *out, O]."""
        weight = want(types[1], "i8", "i16")
        if len(types) > 2 and types[2] is not None:
            require(want(types[2], "i32") == (weight[0],), "the bias does not fit the outputs")
        if len(types) > 3 and types[3] is not None:
            require(want(types[3], "i32") == (1,), "a run-time zero point is one number")
        return [TensorType("i32", conv_type(want(types[0], "u8"), weight, attrs))]

    @staticmethod
    def run(x: Operands, a: Attrs) -> list[Array]:
        """See the class."""
        zero = array(x[3]).astype(F64) if len(x) > 3 and x[3] is not None else a["zero"]
        q = pad_space(array(x[0]).astype(F64) - zero, a["pads"], 0.0)
        acc = convolve(q, array(x[1]).astype(F64), a).astype(np.int64)
        if len(x) > 2 and x[2] is not None:
            acc = acc + array(x[2])
        return [acc.astype(np.int32)]


@define("linear", "zero")
class Linear:
    """`acc = sum (x - z) * w + bias`, z the attribute, or a run-time operand, one per row or one for all.

    x u8 [..., I], w i8 or i16 [O, I], bias i32 [O] or absent, z i32 [..., 1] or [1] or absent -> i32 [..., O].
    """

    @staticmethod
    def infer(types: Types, attrs: Attrs) -> list[TensorType]:
        """[..., O]."""
        x, weight = want(types[0], "u8"), want(types[1], "i8", "i16")
        require(len(weight) == 2 and len(x) > 0 and x[-1] == weight[1], f"x {x} does not fit w {weight}")
        if len(types) > 2 and types[2] is not None:
            require(want(types[2], "i32") == (weight[0],), "the bias does not fit the outputs")
        if len(types) > 3 and types[3] is not None:
            zero = want(types[3], "i32")
            require(zero in ((1,), (*x[:-1], 1)), f"run-time zero points have shape {zero}")
        return [TensorType("i32", (*x[:-1], weight[0]))]

    @staticmethod
    def run(x: Operands, a: Attrs) -> list[Array]:
        """See the class."""
        zero = array(x[3]).astype(F64) if len(x) > 3 and x[3] is not None else a["zero"]
        q = array(x[0]).astype(F64) - zero
        acc = (q @ array(x[1]).astype(F64).T).astype(np.int64)
        if len(x) > 2 and x[2] is not None:
            acc = acc + array(x[2])
        return [acc.astype(np.int32)]


@define("matmul", "a_zero b_zero transpose_b")
class Matmul:
    """`acc = sum_k (a[m, k] - a_zero) * (b[k, n] - b_zero)`, leading axes broadcast; b is [..., n, k] if transposed.

    u8 [..., M, K], u8 [..., K, N] -> i32 [..., M, N].
    """

    @staticmethod
    def infer(types: Types, attrs: Attrs) -> list[TensorType]:
        """[..., M, N]."""
        return [
            TensorType("i32", matmul_type(want(types[0], "u8"), want(types[1], "u8"), attrs["transpose_b"]))
        ]

    @staticmethod
    def run(x: Operands, a: Attrs) -> list[Array]:
        """See the class."""
        left = array(x[0]).astype(F64) - a["a_zero"]
        right = array(x[1]).astype(F64) - a["b_zero"]
        if a["transpose_b"]:
            right = right.swapaxes(-1, -2)
        return [(left @ right).astype(np.int32)]


def matmul_type(a: tuple[int, ...], b: tuple[int, ...], transpose_b: bool) -> tuple[int, ...]:
    """Result shape of a matrix product."""
    require(len(a) >= 2 and len(b) >= 2, f"{a} and {b} are no matrices")
    k, n = (b[-1], b[-2]) if transpose_b else (b[-2], b[-1])
    require(a[-1] == k, f"inner sizes {a[-1]} and {k} differ")
    return (*broadcast(a[:-2], b[:-2]), a[-2], n)


@define("attention", "q_zero k_zero v_zero factor causal")
class Attention:
    """Scaled dot-product attention on codes.

        s = float32(sum (q - q_zero) (k - k_zero)) * factor   (+ mask; -inf above the diagonal if causal)
        e = exp(s - max s),   p = clamp(rint(e * (255 / lane_sum(e))), 0, 255),   acc = sum p * (v - v_zero)

    q u8 [..., T, D], k u8 [..., S, D], v u8 [..., S, E], mask f32 broadcastable to [..., T, S] or absent
    -> i32 [..., T, E], to be rescaled by `sv / 255`. exp and lane_sum as in the op softmax.
    """

    @staticmethod
    def infer(types: Types, attrs: Attrs) -> list[TensorType]:
        """[..., T, E]."""
        q, k, v = (want(t, "u8") for t in types[:3])
        require(len(q) >= 2 and q[:-2] == k[:-2] == v[:-2], f"leading axes of {q}, {k}, {v} differ")
        require(q[-1] == k[-1] and k[-2] == v[-2], f"{q}, {k}, {v} do not fit")
        if len(types) > 3 and types[3] is not None:
            scores = (*q[:-1], k[-2])
            require(broadcast(want(types[3], "f32"), scores) == scores, "the mask does not fit the scores")
        return [TensorType("i32", (*q[:-1], v[-1]))]

    @staticmethod
    def run(x: Operands, a: Attrs) -> list[Array]:
        """See the class."""
        q = array(x[0]).astype(F64) - a["q_zero"]
        k = array(x[1]).astype(F64) - a["k_zero"]
        v = array(x[2]).astype(F64) - a["v_zero"]
        scores = (q @ k.swapaxes(-1, -2)).astype(F32) * F32(a["factor"])
        if len(x) > 3 and x[3] is not None:
            scores = scores + array(x[3])
        if a["causal"]:
            keep = np.tri(scores.shape[-2], scores.shape[-1], dtype=bool)
            scores = np.where(keep, scores, F32(-np.inf))
        e = exp(scores - scores.max(-1, keepdims=True))
        p = np.fmin(np.fmax(np.rint(e * (F32(255) / lane_sum(e))), F32(0)), F32(255))
        return [(p.astype(F64) @ v).astype(np.int32)]

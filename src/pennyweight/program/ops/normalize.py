"""Softmax, layer normalisation and reductions in float32, with the order of the sums laid down."""

from __future__ import annotations

from typing import Any

import numpy as np

from pennyweight.program.ir import Array, TensorType
from pennyweight.program.ops import Attrs, Operands, Types, array, define, real, require, want
from pennyweight.program.ops.functions import exp

F32 = np.float32
LANES = 16


def lane_sum(x: Array) -> Array:
    """Sum over the last axis in 16 lanes: lane l adds x[l], x[l + 16], ... in order; then halves are added: 8, 4, 2, 1.

    Shapes: [..., n] -> [..., 1], every addition float32.
    """
    n = x.shape[-1]
    padded = np.zeros((*x.shape[:-1], -(-max(n, 1) // LANES) * LANES), F32)
    padded[..., :n] = x
    blocks = padded.reshape(*x.shape[:-1], -1, LANES)
    lanes = np.zeros((*x.shape[:-1], LANES), F32)
    for j in range(blocks.shape[-2]):
        lanes = lanes + blocks[..., j, :]
    for half in (8, 4, 2, 1):
        lanes = lanes[..., :half] + lanes[..., half : 2 * half]
    return lanes


def softmax_last(x: Array) -> Array:
    """See the op softmax."""
    if x.shape[-1] == 0:
        return x
    e = exp(x - x.max(-1, keepdims=True))
    return e / lane_sum(e)


@define("softmax")
class Softmax:
    """Over the last axis: `e = exp(x - max x)`, `y = e / lane_sum(e)`. f32 [..., n] -> f32 [..., n].

    exp as in `functions.exp`, the sum in 16 lanes.
    """

    @staticmethod
    def infer(types: Types, attrs: Attrs) -> list[TensorType]:
        """Same shape."""
        shape = want(types[0], "f32")
        require(len(shape) > 0, "softmax of a scalar")
        return [TensorType("f32", shape)]

    @staticmethod
    def run(x: Operands, a: Attrs) -> list[Array]:
        """See the class."""
        with np.errstate(invalid="ignore"):
            return [softmax_last(array(x[0]))]


@define("layer_norm", "eps")
class LayerNorm:
    """Over the last axis of n elements, sums in 16 lanes:

        d = x - sum(x) / n,   v = sum(d * d) / n,   y = d * (1 / sqrt(v + eps)),   y = y * gain,   y = y + shift

    x f32 [..., n], gain f32 [n] or absent, shift f32 [n] or absent -> f32 [..., n].
    Source: Ba et al. 2016 (arXiv:1607.06450).
    """

    @staticmethod
    def infer(types: Types, attrs: Attrs) -> list[TensorType]:
        """Same shape."""
        shape = want(types[0], "f32")
        for t in types[1:]:
            require(t is None or want(t, "f32") == shape[-1:], "gain or shift does not fit")
        return [TensorType("f32", shape)]

    @staticmethod
    def run(x: Operands, a: Attrs) -> list[Array]:
        """See the class."""
        v = array(x[0])
        n = F32(v.shape[-1])
        d = v - lane_sum(v) / n
        variance = lane_sum(d * d) / n
        y = d * (F32(1) / np.sqrt(variance + F32(a["eps"])))
        if len(x) > 1 and x[1] is not None:
            y = y * real(x[1])
        if len(x) > 2 and x[2] is not None:
            y = y + real(x[2])
        return [y]


@define("rms_norm", "eps")
class RmsNorm:
    """Over the last axis of n elements, the sum in 16 lanes: `y = x * (1 / sqrt(sum(x x) / n + eps))`, `y = y * gain`.

    x f32 [..., n], gain f32 [n] or absent -> f32 [..., n]. Source: Zhang, Sennrich 2019 (arXiv:1910.07467), equation 4.
    """

    @staticmethod
    def infer(types: Types, attrs: Attrs) -> list[TensorType]:
        """Same shape."""
        shape = want(types[0], "f32")
        require(len(shape) > 0, "rms_norm of a scalar")
        for t in types[1:]:
            require(t is None or want(t, "f32") == shape[-1:], "gain does not fit")
        return [TensorType("f32", shape)]

    @staticmethod
    def run(x: Operands, a: Attrs) -> list[Array]:
        """See the class."""
        v = array(x[0])
        with np.errstate(all="ignore"):
            y = v * (F32(1) / np.sqrt(lane_sum(v * v) / F32(v.shape[-1]) + F32(a["eps"])))
            return [y * real(x[1]) if len(x) > 1 and x[1] is not None else y]


REDUCTIONS: dict[str, Any] = {
    "sum": np.add,
    "mean": np.add,
    "max": np.max,
    "min": np.min,
    "prod": np.multiply,
}


def folded(v: Array, axes: list[int], combine: Any) -> Array:
    """Elements over rising axes combined one after another, the last axis fastest; axes kept with size 1.

    Sums of f32 over one run of axes with nothing behind it are the exception: they run in 16 lanes (`lane_sum`).
    """
    kept = reduced(v.shape, axes, True)
    one_run = axes == list(range(axes[0], axes[-1] + 1)) and np.prod(v.shape[axes[-1] + 1 :]) == 1
    if combine is np.add and v.dtype == F32 and one_run and v.size:
        return np.reshape(lane_sum(v.reshape(*v.shape[: axes[0]], -1)), kept)
    rows = np.moveaxis(v, axes, range(len(axes)))
    rows = rows.reshape(int(np.prod(rows.shape[: len(axes)])), *rows.shape[len(axes) :])
    if len(rows) == 0:
        return np.full(kept, combine.identity, v.dtype)
    total = rows[0]
    for row in rows[1:]:
        total = combine(total, row)
    return np.reshape(total, kept)


@define("reduce", "fn axes keepdims")
class Reduce:
    """sum, mean, max, min or prod over axes, in the order that `folded` lays down. f32 or i64 -> same dtype."""

    @staticmethod
    def infer(types: Types, attrs: Attrs) -> list[TensorType]:
        """Reduced axes dropped, or kept with size 1."""
        shape = want(types[0], "f32", "i64")
        require(attrs["fn"] in REDUCTIONS, f"unknown reduction {attrs['fn']!r}")
        require(types[0].dtype == "f32" or attrs["fn"] != "mean", "mean of integers")
        require(
            all(0 <= ax < len(shape) for ax in attrs["axes"]), f"axes {attrs['axes']} of rank {len(shape)}"
        )
        return [TensorType(types[0].dtype, reduced(shape, attrs["axes"], attrs["keepdims"]))]

    @staticmethod
    def run(x: Operands, a: Attrs) -> list[Array]:
        """See the class."""
        v, axes, combine = array(x[0]), sorted(a["axes"]), REDUCTIONS[a["fn"]]
        if not axes:
            return [v]
        if a["fn"] in ("max", "min"):
            total = combine(v, axis=tuple(axes), keepdims=True)
        else:
            total = folded(v, axes, combine)
        if a["fn"] == "mean":
            total = total / F32(np.prod([v.shape[i] for i in axes]))
        return [np.reshape(np.asarray(total, v.dtype), reduced(v.shape, axes, a["keepdims"]))]


def reduced(shape: tuple[int, ...], axes: list[int], keepdims: bool) -> tuple[int, ...]:
    """Shape after a reduction."""
    if keepdims:
        return tuple(1 if i in axes else n for i, n in enumerate(shape))
    return tuple(n for i, n in enumerate(shape) if i not in axes)


@define("argmax", "axis keepdims")
class Argmax:
    """Index of the first greatest element along an axis. f32 -> i64."""

    @staticmethod
    def infer(types: Types, attrs: Attrs) -> list[TensorType]:
        """Axis dropped, or kept with size 1."""
        shape = want(types[0], "f32")
        require(0 <= attrs["axis"] < len(shape), "axis out of range")
        return [TensorType("i64", reduced(shape, [attrs["axis"]], attrs["keepdims"]))]

    @staticmethod
    def run(x: Operands, a: Attrs) -> list[Array]:
        """See the class."""
        return [np.asarray(np.argmax(array(x[0]), axis=a["axis"], keepdims=a["keepdims"]), np.int64)]

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


REDUCTIONS: dict[str, Any] = {"sum": np.sum, "mean": np.mean, "max": np.max, "min": np.min, "prod": np.prod}


@define("reduce", "fn axes keepdims", exact=False)
class Reduce:
    """sum, mean, max, min or prod over axes. f32 or i64 -> same dtype."""

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
        v = array(x[0])
        return [np.asarray(REDUCTIONS[a["fn"]](v, axis=tuple(a["axes"]), keepdims=a["keepdims"]), v.dtype)]


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

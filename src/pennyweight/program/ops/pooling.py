"""Pools over [N, *space, C]."""

from __future__ import annotations

import numpy as np

from pennyweight.program.ir import Array, TensorType
from pennyweight.program.ops import Attrs, Operands, Types, array, define, halved, real, require, want
from pennyweight.program.ops.normalize import reduced
from pennyweight.program.ops.products import pad_space, window_sizes, windows


def pool_type(shape: tuple[int, ...], attrs: Attrs, dilation: list[int]) -> tuple[int, ...]:
    """Result shape of a pool."""
    dims = len(shape) - 2
    require(dims in (1, 2, 3), f"a pool over shape {shape}")
    for key, n in (("kernel", dims), ("stride", dims), ("pads", 2 * dims)):
        require(len(attrs[key]) == n, f"{key} has {len(attrs[key])} entries, wanted {n}")
    require(len(dilation) == dims, f"dilation has {len(dilation)} entries, wanted {dims}")
    require(
        all(v > 0 for v in [*attrs["kernel"], *attrs["stride"], *dilation]),
        "kernel and stride must be positive",
    )
    require(all(p >= 0 for p in attrs["pads"]), "pads must not be negative")
    return (
        shape[0],
        *window_sizes(shape[1:-1], attrs["kernel"], attrs["stride"], attrs["pads"], dilation),
        shape[-1],
    )


@define("max_pool", "kernel stride pads dilation")
class MaxPool:
    """Greatest entry of each window; padding never wins. u8, f32 or bf16 [N, *space, C] -> same dtype [N, *out, C]."""

    @staticmethod
    def infer(types: Types, attrs: Attrs) -> list[TensorType]:
        """[N, *out, C]."""
        shape = want(types[0], "u8", "f32", "bf16")
        return [TensorType(types[0].dtype, pool_type(shape, attrs, attrs["dilation"]))]

    @staticmethod
    def run(x: Operands, a: Attrs) -> list[Array]:
        """See the class."""
        v = array(x[0])
        half = v.dtype == np.uint16
        v = real(v) if half else v
        low = 0 if v.dtype == np.uint8 else -np.inf
        view = windows(pad_space(v, a["pads"], low), a["kernel"], a["stride"], a["dilation"])
        y = view.max(axis=tuple(range(v.ndim, view.ndim)))
        return [halved(y) if half else y]


@define("sum_pool", "zero kernel stride pads")
class SumPool:
    """`acc = sum (x - zero)` over each window, padding counts nothing. u8 [N, *space, C] -> i32 [N, *out, C]."""

    @staticmethod
    def infer(types: Types, attrs: Attrs) -> list[TensorType]:
        """[N, *out, C]."""
        shape = want(types[0], "u8")
        return [TensorType("i32", pool_type(shape, attrs, [1] * (len(shape) - 2)))]

    @staticmethod
    def run(x: Operands, a: Attrs) -> list[Array]:
        """See the class."""
        v = pad_space(array(x[0]).astype(np.int32) - a["zero"], a["pads"], 0)
        view = windows(v, a["kernel"], a["stride"], [1] * (v.ndim - 2))
        return [view.sum(axis=tuple(range(v.ndim, view.ndim)), dtype=np.int32)]


@define("sum_q", "zero axes keepdims")
class SumQ:
    """`acc = sum (x - zero)` over axes. u8 -> i32."""

    @staticmethod
    def infer(types: Types, attrs: Attrs) -> list[TensorType]:
        """Reduced axes dropped, or kept with size 1."""
        shape = want(types[0], "u8")
        require(
            all(0 <= ax < len(shape) for ax in attrs["axes"]), f"axes {attrs['axes']} of rank {len(shape)}"
        )
        return [TensorType("i32", reduced(shape, attrs["axes"], attrs["keepdims"]))]

    @staticmethod
    def run(x: Operands, a: Attrs) -> list[Array]:
        """See the class."""
        v = array(x[0]).astype(np.int32) - a["zero"]
        return [np.asarray(v.sum(axis=tuple(a["axes"]), keepdims=a["keepdims"], dtype=np.int32))]


@define("avg_pool", "kernel stride pads count_pads")
class AvgPool:
    """Mean of each window, taps added one after another, the last axis fastest; padding counts as zeros, or not at all.

    f32 [N, *space, C] -> f32 [N, *out, C].
    """

    @staticmethod
    def infer(types: Types, attrs: Attrs) -> list[TensorType]:
        """[N, *out, C]."""
        shape = want(types[0], "f32")
        return [TensorType("f32", pool_type(shape, attrs, [1] * (len(shape) - 2)))]

    @staticmethod
    def run(x: Operands, a: Attrs) -> list[Array]:
        """See the class."""
        v = array(x[0])
        one = [1] * (v.ndim - 2)
        view = windows(pad_space(v, a["pads"], 0.0), a["kernel"], a["stride"], one)
        axes = tuple(range(v.ndim, view.ndim))
        total = np.zeros(view.shape[: v.ndim], np.float32)
        for tap in np.ndindex(*a["kernel"]):
            total = total + view[(..., *tap)]
        if a["count_pads"]:
            return [(total / np.float32(np.prod(a["kernel"]))).astype(np.float32)]
        ones = pad_space(np.ones((1, *v.shape[1:-1], 1), np.float32), a["pads"], 0.0)
        return [(total / windows(ones, a["kernel"], a["stride"], one).sum(axis=axes)).astype(np.float32)]

"""Elementwise ops in float32, int64 and bool."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from pennyweight.program.ir import Array, TensorType, numpy_dtype
from pennyweight.program.ops import (
    Attrs,
    Operands,
    Types,
    array,
    broadcast,
    define,
    halved,
    real,
    require,
    want,
)
from pennyweight.program.ops.functions import UNARY

ARITHMETIC: dict[str, Callable[..., Any]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "min": np.minimum,
    "max": np.maximum,
    "pow": np.power,
    "floordiv": np.floor_divide,
    "mod": np.mod,
}
COMPARISONS: dict[str, Callable[..., Any]] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
LOGIC: dict[str, Callable[..., Any]] = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


@define("unary", "fn p q")
class Unary:
    """`y = fn(x)` with up to two parameters; `functions.UNARY` has the equations. f32 -> f32."""

    @staticmethod
    def infer(types: Types, attrs: Attrs) -> list[TensorType]:
        """Same shape."""
        require(attrs["fn"] in UNARY, f"unknown function {attrs['fn']!r}")
        return [TensorType("f32", want(types[0], "f32"))]

    @staticmethod
    def run(x: Operands, a: Attrs) -> list[Array]:
        """See the class."""
        with np.errstate(all="ignore"):
            return [np.asarray(UNARY[a["fn"]][0](real(x[0]), a["p"], a["q"]), np.float32)]


@define("binary", "fn")
class Binary:
    """`y = fn(a, b)`, numpy broadcasting. Both f32, both i64, or both bool; comparisons give bool."""

    @staticmethod
    def infer(types: Types, attrs: Attrs) -> list[TensorType]:
        """Broadcast shape."""
        fn = attrs["fn"]
        a, b = want(types[0], "f32", "i64", "bool"), want(types[1], "f32", "i64", "bool")
        dtype = types[0].dtype
        require(dtype == types[1].dtype, f"operands are {dtype} and {types[1].dtype}")
        require(fn in ARITHMETIC or fn in COMPARISONS or fn in LOGIC, f"unknown function {fn!r}")
        require((fn in LOGIC) == (dtype == "bool") or fn in ("eq", "ne"), f"{fn} of {dtype}")
        require(not (dtype == "i64" and fn in ("div", "pow")), f"{fn} of {dtype}")
        return [TensorType("bool" if fn in COMPARISONS else dtype, broadcast(a, b))]

    @staticmethod
    def run(x: Operands, a: Attrs) -> list[Array]:
        """See the class."""
        fn = a["fn"]
        function = ARITHMETIC.get(fn) or COMPARISONS.get(fn) or LOGIC[fn]
        with np.errstate(all="ignore"):
            return [np.asarray(function(array(x[0]), array(x[1])))]


@define("rotary")
class Rotary:
    """Pairs h = n / 2 apart, turned:

        y[i] = x[i] cos[i] - x[i + h] sin[i],   y[i + h] = x[i + h] cos[i + h] + x[i] sin[i + h]

    x f32 [..., n]; cos, sin f32 [..., n], broadcast to x -> f32 [..., n]. Source: Su et al. 2021 (arXiv:2104.09864),
    equation 34, the pairs of a vector's halves.
    """

    @staticmethod
    def infer(types: Types, attrs: Attrs) -> list[TensorType]:
        """Same shape."""
        shape = want(types[0], "f32")
        require(len(shape) > 0 and shape[-1] % 2 == 0, "rotary takes rows of an even size")
        for t in types[1:3]:
            turn = want(t, "f32")
            fits = turn[-1:] == shape[-1:] and broadcast(shape, turn) == shape
            require(fits, f"cos or sin {turn} does not fit {shape}")
        return [TensorType("f32", shape)]

    @staticmethod
    def run(x: Operands, a: Attrs) -> list[Array]:
        """See the class."""
        v, cos, sin = (real(t) for t in x[:3])
        h = v.shape[-1] // 2
        with np.errstate(all="ignore"):
            return [v * cos + np.concatenate([-v[..., h:], v[..., :h]], -1) * sin]


@define("hadamard", "size")
class Hadamard:
    """Runs of `size` = 2^k numbers of the last axis times the orthonormal Hadamard matrix.

        for h = 1, 2, 4 .. size / 2:  x[i], x[i + h] = x[i] + x[i + h], x[i] - x[i + h]   (i without the bit h)
        y = x * float32(1 / sqrt(size))

    f32 [..., n], n a multiple of size -> f32 [..., n]. It is its own inverse. Source: the fast Walsh-Hadamard
    transform, as QuaRot applies it to activations (Ashkboos et al. 2024, arXiv:2404.00456, section 4).
    """

    @staticmethod
    def infer(types: Types, attrs: Attrs) -> list[TensorType]:
        """Same shape."""
        shape, size = want(types[0], "f32"), attrs["size"]
        require(type(size) is int and size > 0 and size & (size - 1) == 0, f"{size} is no power of two")
        require(len(shape) > 0 and shape[-1] % size == 0, f"runs of {size} do not fill rows of {shape}")
        return [TensorType("f32", shape)]

    @staticmethod
    def run(x: Operands, a: Attrs) -> list[Array]:
        """See the class."""
        v, size, h = real(x[0]), a["size"], 1
        y = v.reshape(-1, size)
        with np.errstate(all="ignore"):
            while h < size:
                pairs = y.reshape(-1, 2, h)
                y = np.stack([pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]], 1)
                h *= 2
            return [y.reshape(v.shape) * np.float32(1 / np.sqrt(size))]


@define("cast", "dtype")
class Cast:
    """Convert between f32, i64 and bool; floats are cut towards zero. Any -> dtype.

    f32 -> bf16 rounds to nearest, ties to even.
    """

    @staticmethod
    def infer(types: Types, attrs: Attrs) -> list[TensorType]:
        """Same shape."""
        require(attrs["dtype"] in ("f32", "i64", "bool", "bf16"), f"cast to {attrs['dtype']}")
        if attrs["dtype"] == "bf16":
            return [TensorType("bf16", want(types[0], "f32"))]
        return [TensorType(attrs["dtype"], want(types[0], "f32", "f16", "bf16", "i64", "i32", "bool"))]

    @staticmethod
    def run(x: Operands, a: Attrs) -> list[Array]:
        """See the class."""
        if a["dtype"] == "bf16":
            return [halved(real(x[0]))]
        v = array(x[0])
        v = real(x[0]) if v.dtype in (np.float16, np.uint16) else v
        return [v.astype(numpy_dtype(a["dtype"]))]


@define("where")
class Where:
    """`y = a where c else b`, numpy broadcasting. bool, T, T -> T."""

    @staticmethod
    def infer(types: Types, attrs: Attrs) -> list[TensorType]:
        """Broadcast shape."""
        c, a, b = (
            want(types[0], "bool"),
            want(types[1], "f32", "i64", "bool"),
            want(types[2], "f32", "i64", "bool"),
        )
        require(types[1].dtype == types[2].dtype, "branches differ in dtype")
        return [TensorType(types[1].dtype, broadcast(broadcast(c, a), b))]

    @staticmethod
    def run(x: Operands, a: Attrs) -> list[Array]:
        """See the class."""
        return [np.where(array(x[0]), array(x[1]), array(x[2]))]


@define("iota", "size step start")
class Iota:
    """`start + step * [0, 1, ..., size - 1]` -> i64 [size]."""

    @staticmethod
    def infer(types: Types, attrs: Attrs) -> list[TensorType]:
        """[size]."""
        require(attrs["size"] >= 0, "negative size")
        return [TensorType("i64", (attrs["size"],))]

    @staticmethod
    def run(x: Operands, a: Attrs) -> list[Array]:
        """See the class."""
        return [a["start"] + a["step"] * np.arange(a["size"], dtype=np.int64)]


@define("full", "shape value dtype")
class Full:
    """One value everywhere -> dtype [shape]."""

    @staticmethod
    def infer(types: Types, attrs: Attrs) -> list[TensorType]:
        """The shape."""
        require(attrs["dtype"] in ("f32", "i64", "bool"), f"fill with {attrs['dtype']}")
        return [TensorType(attrs["dtype"], tuple(attrs["shape"]))]

    @staticmethod
    def run(x: Operands, a: Attrs) -> list[Array]:
        """See the class."""
        return [np.full(a["shape"], a["value"], numpy_dtype(a["dtype"]))]

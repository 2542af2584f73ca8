"""Ops that move values and change none, for every dtype."""

from __future__ import annotations

import math

import numpy as np

from pennyweight.program.ir import Array, TensorType
from pennyweight.program.ops import Attrs, Operands, Types, array, broadcast, define, require, want

FILLED = ("f32", "u8", "i8", "i32", "i64", "bool")  # what a stated value may stand beside
ANY = (*FILLED, "bf16")


@define("reshape", "shape")
class Reshape:
    """Same elements in row-major order, another shape; one size may be -1."""

    @staticmethod
    def infer(types: Types, attrs: Attrs) -> list[TensorType]:
        """The shape."""
        old, new = want(types[0], *ANY), list(attrs["shape"])
        require(new.count(-1) <= 1, "more than one size is -1")
        if -1 in new:
            rest = math.prod(d for d in new if d != -1)
            require(rest > 0 and math.prod(old) % rest == 0, f"{old} does not reshape to {new}")
            new[new.index(-1)] = math.prod(old) // rest
        require(
            math.prod(old) == math.prod(new) and all(d >= 0 for d in new), f"{old} does not reshape to {new}"
        )
        return [TensorType(types[0].dtype, tuple(new))]

    @staticmethod
    def run(x: Operands, a: Attrs) -> list[Array]:
        """See the class."""
        v, shape = array(x[0]), list(a["shape"])
        if -1 in shape:  # numpy cannot tell the missing size of an empty array
            shape[shape.index(-1)] = v.size // max(-math.prod(shape), 1)
        return [v.reshape(shape)]


@define("transpose", "perm")
class Transpose:
    """Axis i of the result is axis perm[i] of the operand."""

    @staticmethod
    def infer(types: Types, attrs: Attrs) -> list[TensorType]:
        """Permuted shape."""
        shape, perm = want(types[0], *ANY), attrs["perm"]
        require(sorted(perm) == list(range(len(shape))), f"{perm} is no permutation of rank {len(shape)}")
        return [TensorType(types[0].dtype, tuple(shape[p] for p in perm))]

    @staticmethod
    def run(x: Operands, a: Attrs) -> list[Array]:
        """See the class."""
        return [np.ascontiguousarray(array(x[0]).transpose(a["perm"]))]


@define("slice", "starts stops steps")
class Slice:
    """`x[start:stop:step]` on every axis; 0 <= start <= stop <= size, step > 0."""

    @staticmethod
    def infer(types: Types, attrs: Attrs) -> list[TensorType]:
        """Sizes `ceil((stop - start) / step)`."""
        shape = want(types[0], *ANY)
        starts, stops, steps = attrs["starts"], attrs["stops"], attrs["steps"]
        require(len(starts) == len(stops) == len(steps) == len(shape), "one start, stop and step per axis")
        for n, a, b, s in zip(shape, starts, stops, steps, strict=True):
            require(0 <= a <= b <= n and s > 0, f"slice {a}:{b}:{s} of an axis of {n}")
        out = tuple(-(-(b - a) // s) for a, b, s in zip(starts, stops, steps, strict=True))
        return [TensorType(types[0].dtype, out)]

    @staticmethod
    def run(x: Operands, a: Attrs) -> list[Array]:
        """See the class."""
        index = tuple(slice(*t) for t in zip(a["starts"], a["stops"], a["steps"], strict=True))
        return [np.ascontiguousarray(array(x[0])[index])]


@define("concat", "axis")
class Concat:
    """Operands one after the other along an axis."""

    @staticmethod
    def infer(types: Types, attrs: Attrs) -> list[TensorType]:
        """Sizes along the axis added."""
        shapes = [want(t, *ANY) for t in types]
        axis = attrs["axis"]
        require(bool(shapes) and 0 <= axis < len(shapes[0]), f"axis {axis}")
        for t, s in zip(types, shapes, strict=True):
            require(t.dtype == types[0].dtype, "operands differ in dtype")
            require(len(s) == len(shapes[0]), "operands differ in rank")
            rest = all(m == n for i, (m, n) in enumerate(zip(s, shapes[0], strict=True)) if i != axis)
            require(rest, f"{s} does not join {shapes[0]} along axis {axis}")
        out = list(shapes[0])
        out[axis] = sum(s[axis] for s in shapes)
        return [TensorType(types[0].dtype, tuple(out))]

    @staticmethod
    def run(x: Operands, a: Attrs) -> list[Array]:
        """See the class."""
        return [np.concatenate([array(v) for v in x], axis=a["axis"])]


@define("pad", "pads value")
class Pad:
    """Constant padding; pads is [begin..., end...] over all axes, none negative."""

    @staticmethod
    def infer(types: Types, attrs: Attrs) -> list[TensorType]:
        """Sizes grown."""
        shape, pads = want(types[0], *FILLED), attrs["pads"]
        n = len(shape)
        require(len(pads) == 2 * n and all(p >= 0 for p in pads), f"pads {pads} for rank {n}")
        return [TensorType(types[0].dtype, tuple(s + pads[i] + pads[n + i] for i, s in enumerate(shape)))]

    @staticmethod
    def run(x: Operands, a: Attrs) -> list[Array]:
        """See the class."""
        v = array(x[0])
        widths = [(a["pads"][i], a["pads"][v.ndim + i]) for i in range(v.ndim)]
        return [np.pad(v, widths, constant_values=np.asarray(a["value"], v.dtype))]


@define("expand", "shape")
class Expand:
    """Repeat axes of size 1 to a larger shape."""

    @staticmethod
    def infer(types: Types, attrs: Attrs) -> list[TensorType]:
        """The shape."""
        old, new = want(types[0], *ANY), tuple(attrs["shape"])
        require(broadcast(old, new) == new, f"{old} does not expand to {new}")
        return [TensorType(types[0].dtype, new)]

    @staticmethod
    def run(x: Operands, a: Attrs) -> list[Array]:
        """See the class."""
        return [np.ascontiguousarray(np.broadcast_to(array(x[0]), a["shape"]))]


@define("gather", "axis")
class Gather:
    """Entries of an axis by index: `y[..., i, ...] = x[..., index[i], ...]`. T [.., n, ..], i64 [*m] -> T [.., *m, ..].

    A negative index counts from the end; one out of range is an error at run time.
    """

    @staticmethod
    def infer(types: Types, attrs: Attrs) -> list[TensorType]:
        """The axis replaced by the shape of the index."""
        shape, index, axis = want(types[0], *ANY), want(types[1], "i64"), attrs["axis"]
        require(0 <= axis < len(shape), f"axis {axis}")
        return [TensorType(types[0].dtype, shape[:axis] + index + shape[axis + 1 :])]

    @staticmethod
    def run(x: Operands, a: Attrs) -> list[Array]:
        """See the class."""
        v, index = array(x[0]), checked_index(array(x[1]), array(x[0]).shape[a["axis"]])
        return [np.ascontiguousarray(np.take(v, index, axis=a["axis"]))]


@define("gather_nd")
class GatherND:
    """Entries by a tuple of indices into the leading axes, broadcast: `y[...] = x[i0[...], i1[...], :]`.

    T [n0, n1, ..., rest], i64 [*m] per index -> T [*m, rest].
    """

    @staticmethod
    def infer(types: Types, attrs: Attrs) -> list[TensorType]:
        """Broadcast indices, then the rest."""
        shape = want(types[0], *ANY)
        lead: tuple[int, ...] = ()
        for t in types[1:]:
            lead = broadcast(lead, want(t, "i64"))
        require(0 < len(types) - 1 <= len(shape), "more indices than axes")
        return [TensorType(types[0].dtype, lead + shape[len(types) - 1 :])]

    @staticmethod
    def run(x: Operands, a: Attrs) -> list[Array]:
        """See the class."""
        v = array(x[0])
        index = np.broadcast_arrays(*(checked_index(array(i), v.shape[k]) for k, i in enumerate(x[1:])))
        return [np.ascontiguousarray(v[tuple(index)])]


def checked_index(index: Array, size: int) -> Array:
    """Negative indices counted from the end.

    Raises:
        InputError: if an index is out of range.
    """
    from pennyweight.errors import InputError

    if index.size and (index.min() < -size or index.max() >= size):
        worst = int(index.max() if index.max() >= size else index.min())
        raise InputError(f"index {worst} is out of range for an axis of {size}")
    return np.where(index < 0, index + size, index)


@define("upsample", "repeats")
class Upsample:
    """Repeat every entry of axis i repeats[i] times in place (nearest neighbour by whole factors)."""

    @staticmethod
    def infer(types: Types, attrs: Attrs) -> list[TensorType]:
        """Sizes multiplied."""
        shape = want(types[0], *ANY)
        require(
            len(attrs["repeats"]) == len(shape) and all(r > 0 for r in attrs["repeats"]),
            "one factor per axis",
        )
        return [
            TensorType(types[0].dtype, tuple(n * r for n, r in zip(shape, attrs["repeats"], strict=True)))
        ]

    @staticmethod
    def run(x: Operands, a: Attrs) -> list[Array]:
        """See the class."""
        v = array(x[0])
        for axis, repeat in enumerate(a["repeats"]):
            v = np.repeat(v, repeat, axis) if repeat > 1 else v
        return [np.ascontiguousarray(v)]


@define("stuff", "factors value")
class Stuff:
    """Put factors[i] - 1 copies of a value between the entries of axis i (a transposed convolution's first step)."""

    @staticmethod
    def infer(types: Types, attrs: Attrs) -> list[TensorType]:
        """Sizes `(n - 1) * factor + 1`."""
        shape = want(types[0], *FILLED)
        require(
            len(attrs["factors"]) == len(shape) and all(f > 0 for f in attrs["factors"]),
            "one factor per axis",
        )
        out = tuple((n - 1) * f + 1 if n else 0 for n, f in zip(shape, attrs["factors"], strict=True))
        return [TensorType(types[0].dtype, out)]

    @staticmethod
    def run(x: Operands, a: Attrs) -> list[Array]:
        """See the class."""
        v = array(x[0])
        shape = [(n - 1) * f + 1 if n else 0 for n, f in zip(v.shape, a["factors"], strict=True)]
        y = np.full(shape, a["value"], v.dtype)
        y[tuple(slice(None, None, f) for f in a["factors"])] = v
        return [y]

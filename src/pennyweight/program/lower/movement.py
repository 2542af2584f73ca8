"""Lowering of torch ops that move values."""

from __future__ import annotations

from typing import Any

import torch

from pennyweight.errors import LowerError
from pennyweight.program.ir import Dim
from pennyweight.program.lower.builder import Builder, Value, argument, handles


@handles(
    "aten.view.default", "aten.reshape.default", "aten._unsafe_view.default", "aten.flatten.using_ints",
    "aten.unflatten.int", "aten.squeeze.default", "aten.squeeze.dim", "aten.squeeze.dims", "aten.unsqueeze.default",
    "aten.view_as.default", "aten.reshape_as.default",
)  # fmt: skip
def _reshape(b: Builder, args: Any, kwargs: Any) -> Value:
    """The exporter knows the result's sizes, whatever the call said."""
    return b.emit("reshape", [b.value(args[0])], shape=b.dims(kwargs.node.meta["val"].shape))


def _transposed(b: Builder, x: Value, perm: list[int]) -> Value:
    return b.emit("transpose", [x], perm=perm)


@handles("aten.permute.default")
def _permute(b: Builder, args: Any, kwargs: Any) -> Value:
    x = b.value(args[0])
    return _transposed(b, x, [p % x.rank for p in args[1]])


@handles("aten.transpose.int", "aten.swapaxes.default")
def _transpose(b: Builder, args: Any, kwargs: Any) -> Value:
    x = b.value(args[0])
    perm = list(range(x.rank))
    i, j = args[1] % x.rank, args[2] % x.rank
    perm[i], perm[j] = perm[j], perm[i]
    return _transposed(b, x, perm)


@handles("aten.t.default", "aten.numpy_T.default")
def _t(b: Builder, args: Any, kwargs: Any) -> Value:
    x = b.value(args[0])
    return _transposed(b, x, list(range(x.rank))[::-1])


@handles("aten.movedim.int", "aten.movedim.intlist")
def _movedim(b: Builder, args: Any, kwargs: Any) -> Value:
    x = b.value(args[0])
    order = torch.empty(tuple(range(1, x.rank + 1)), device="meta").movedim(args[1], args[2])
    return _transposed(b, x, [int(n) - 1 for n in order.shape])


def _sliced(b: Builder, x: Value, axis: int, start: Dim, stop: Dim, step: int = 1) -> Value:
    starts: list[Dim] = [0] * x.rank
    stops: list[Dim] = list(x.shape)
    steps = [1] * x.rank
    starts[axis], stops[axis], steps[axis] = start, stop, step
    return b.emit("slice", [x], starts=starts, stops=stops, steps=steps)


@handles("aten.slice.Tensor")
def _slice(b: Builder, args: Any, kwargs: Any) -> Value:
    x = b.value(args[0])
    axis = argument(args, kwargs, 1, "dim", 0) % x.rank
    start, stop = argument(args, kwargs, 2, "start"), argument(args, kwargs, 3, "end")
    step = argument(args, kwargs, 4, "step", 1)
    size: Dim = x.shape[axis]

    def bound(v: Any, default: Dim) -> Dim:  # an end of the slice, within the axis
        if v is None:
            return default
        if isinstance(v, int) and isinstance(size, int):
            inside: int = max(0, min(v + size if v < 0 else v, size))
            return inside
        if isinstance(v, int) and v < 0:
            return f"({size} - {-v})"
        if isinstance(v, int) and v > 2**31:
            return size
        return b.dim(v)

    first, last = bound(start, 0), bound(stop, size)
    if first == 0 and last == size and step == 1:
        return x
    return _sliced(b, x, axis, first, last, step)


@handles("aten.select.int")
def _select(b: Builder, args: Any, kwargs: Any) -> Value:
    x, axis, index = b.value(args[0]), args[1], args[2]
    axis %= x.rank
    size = x.shape[axis]
    place: Dim = (
        index
        if not (isinstance(index, int) and index < 0)
        else size + index
        if isinstance(size, int)
        else f"({size} - {-index})"
    )
    place = b.dim(place)
    end: Dim = place + 1 if isinstance(place, int) else f"({place} + 1)"
    one = _sliced(b, x, axis, place, end)
    return b.emit("reshape", [one], shape=[*x.shape[:axis], *x.shape[axis + 1 :]])


@handles("aten.narrow.default")
def _narrow(b: Builder, args: Any, kwargs: Any) -> Value:
    x = b.value(args[0])
    return _sliced(b, x, args[1] % x.rank, args[2], args[2] + args[3])


def _pieces(b: Builder, x: Value, axis: int, sizes: list[int]) -> list[Value]:
    out, start = [], 0
    for size in sizes:
        out.append(_sliced(b, x, axis, start, start + size))
        start += size
    return out


@handles(
    "aten.chunk.default",
    "aten.split.Tensor",
    "aten.split_with_sizes.default",
    "aten.split.sizes",
    "aten.unbind.int",
)
def _split(b: Builder, args: Any, kwargs: Any) -> list[Value]:
    x = b.value(args[0])
    unbind = "unbind" in str(kwargs.node.target)
    axis = argument(args, kwargs, 1 if unbind else 2, "dim", 0) % x.rank
    results = kwargs.node.meta["val"]
    sizes = [1] * len(results) if unbind else [int(r.shape[axis]) for r in results]
    pieces = _pieces(b, x, axis, sizes)
    if unbind:
        rest = [*x.shape[:axis], *x.shape[axis + 1 :]]
        return [b.emit("reshape", [p], shape=rest) for p in pieces]
    return pieces


@handles("aten.cat.default", "aten.concat.default", "aten.concatenate.default")
def _cat(b: Builder, args: Any, kwargs: Any) -> Value:
    parts = [b.value(p) for p in args[0]]
    parts = [p for p in parts if not (p.rank == 1 and p.shape[0] == 0)]
    axis = argument(args, kwargs, 1, "dim", 0) % parts[0].rank
    return b.emit("concat", parts, axis=axis)


@handles("aten.stack.default")
def _stack(b: Builder, args: Any, kwargs: Any) -> Value:
    parts = [b.value(p) for p in args[0]]
    axis = argument(args, kwargs, 1, "dim", 0) % (parts[0].rank + 1)
    grown = [b.emit("reshape", [p], shape=[*p.shape[:axis], 1, *p.shape[axis:]]) for p in parts]
    return b.emit("concat", grown, axis=axis)


@handles("aten.pad.default", "aten.constant_pad_nd.default", "aten.zero_pad2d.default")
def _pad(b: Builder, args: Any, kwargs: Any) -> Value:
    x, pairs = b.value(args[0]), list(args[1])
    mode, value = "constant", argument(args, kwargs, 2, "value", 0.0)
    if str(kwargs.node.target).startswith("aten.pad."):
        mode, value = argument(args, kwargs, 2, "mode", "constant"), argument(args, kwargs, 3, "value") or 0.0
    if mode != "constant":
        for i in range(len(pairs) // 2):
            x = _pad_with_entries(b, x, x.rank - 1 - i, (pairs[2 * i], pairs[2 * i + 1]), mode)
        return x
    begin, end = [0] * x.rank, [0] * x.rank
    for i in range(len(pairs) // 2):
        begin[x.rank - 1 - i], end[x.rank - 1 - i] = pairs[2 * i], pairs[2 * i + 1]
    if min(*begin, *end) < 0:
        starts: list[Dim] = [max(0, -v) for v in begin]
        stops: list[Dim] = [n if v >= 0 else int(n) + v for n, v in zip(x.shape, end, strict=True)]
        x = b.emit("slice", [x], starts=starts, stops=stops, steps=[1] * x.rank)
    pads = [max(0, v) for v in [*begin, *end]]
    return b.emit("pad", [x], pads=pads, value=float(value))


def _pad_with_entries(b: Builder, x: Value, axis: int, pads: tuple[int, int], mode: str) -> Value:
    """Pad one axis with its own entries: mirrored without the edge, the edge repeated, or from the other end."""
    before, after = pads
    if before == after == 0:
        return x
    if min(pads) < 0 or mode not in ("reflect", "replicate", "circular"):
        raise LowerError(f"padding by {pads} in mode {mode!r} has no program form", site=b.site, hint=b.where)
    size: Dim = x.shape[axis]

    def from_end(k: int) -> Dim:
        return size - k if isinstance(size, int) else f"({size} - {k})"

    def part(start: Dim, stop: Dim) -> Value:
        starts: list[Dim] = [0] * x.rank
        stops: list[Dim] = list(x.shape)
        starts[axis], stops[axis] = start, stop
        return b.emit("slice", [x], starts=starts, stops=stops, steps=[1] * x.rank)

    if mode == "circular":
        head = [part(from_end(before), size)] if before else []
        tail = [part(0, after)] if after else []
    elif mode == "replicate":
        head, tail = [part(0, 1)] * before, [part(from_end(1), size)] * after
    else:
        head = [part(k, k + 1) for k in range(before, 0, -1)]
        tail = [part(from_end(k + 1), from_end(k)) for k in range(1, after + 1)]
    return b.emit("concat", [*head, x, *tail], axis=axis)


@handles("aten.expand.default", "aten.expand_as.default", "aten.broadcast_to.default")
def _expand(b: Builder, args: Any, kwargs: Any) -> Value:
    shape = b.dims(kwargs.node.meta["val"].shape)
    x = b.value(args[0])
    if list(x.shape) == shape:
        return x
    return b.emit("expand", [x], shape=shape)


@handles("aten.repeat.default", "aten.tile.default")
def _repeat(b: Builder, args: Any, kwargs: Any) -> Value:
    x, repeats = b.value(args[0]), list(args[1])
    if len(repeats) > x.rank:
        x = b.emit("reshape", [x], shape=[*[1] * (len(repeats) - x.rank), *x.shape])
    for axis, r in enumerate([1] * (x.rank - len(repeats)) + repeats):
        if r != 1:
            if not isinstance(r, int):
                if x.shape[axis] != 1:
                    raise LowerError("repetition by a size of the input", site=b.site, hint=b.where)
                shape = [*x.shape[:axis], b.dim(r), *x.shape[axis + 1 :]]
                x = b.emit("expand", [x], shape=shape)
            else:
                x = b.emit("concat", [x] * r, axis=axis)
    return x


@handles("aten.repeat_interleave.self_int")
def _interleave(b: Builder, args: Any, kwargs: Any) -> Value:
    x, repeat = b.value(args[0]), args[1]
    axis = argument(args, kwargs, 2, "dim")
    if axis is None:
        x, axis = b.emit("reshape", [x], shape=[-1]), 0
    return b.emit("upsample", [x], repeats=[repeat if i == axis % x.rank else 1 for i in range(x.rank)])


@handles("aten.flip.default")
def _flip(b: Builder, args: Any, kwargs: Any) -> Value:
    import numpy as np

    x = b.value(args[0])
    for axis in args[1]:
        size = b.type_of(x).ints[axis % x.rank]
        index = b.constant(np.arange(size - 1, -1, -1, dtype=np.int64), "reversed")
        x = b.emit("gather", [x, index], axis=axis % x.rank)
    return x


@handles("aten.pixel_shuffle.default")
def _pixel_shuffle(b: Builder, args: Any, kwargs: Any) -> Value:
    x, r = b.value(args[0]), args[1]
    n, c, h, w = x.shape
    y = b.emit("reshape", [x], shape=[n, int(c) // (r * r), r, r, h, w])
    y = b.emit("transpose", [y], perm=[0, 1, 4, 2, 5, 3])
    return b.emit("reshape", [y], shape=b.dims(kwargs.node.meta["val"].shape))


@handles("aten.channel_shuffle.default", "aten.native_channel_shuffle.default")
def _channel_shuffle(b: Builder, args: Any, kwargs: Any) -> Value:
    x, groups = b.value(args[0]), args[1]
    y = b.emit("reshape", [x], shape=[x.shape[0], groups, int(x.shape[1]) // groups, *x.shape[2:]])
    y = b.emit("transpose", [y], perm=[0, 2, 1, *range(3, x.rank + 1)])
    return b.emit("reshape", [y], shape=list(x.shape))

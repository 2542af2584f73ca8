"""Where a factor on a channel can be moved from one layer into the next ones, past what lies between."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from pennyweight.graph.graph import Graph, Node, Ref

# f(a x) = a f(x) for a > 0, channel by channel
_HOMOGENEOUS = frozenset(
    """relu leaky_relu dropout dropout1d dropout2d identity contiguous max_pool1d max_pool2d max_pool3d
    avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool2d
    mean flatten pad detach clone""".split()
)
_CLIPS = frozenset("relu6 hardtanh clamp clip".split())
_PRODUCERS = frozenset({"Conv1d", "Conv2d", "Conv3d", "Linear"})


@dataclass(frozen=True, slots=True)
class Link:
    """A layer and everything that reads its outputs.

    Dividing output channel i of the producer and multiplying input channel i of every consumer with it leaves the
    network's function as it is, as long as no channel is cut off at `limit` that was not, and none is no longer.

    Attributes:
        producer: path of the layer, or of the parameters of a layer norm.
        consumers: paths of the layers that read its channels.
        limit: least upper bound of the clips between them; infinite without any.
        rectified: whether values below zero are cut off.
        padded: whether zeros are put in between, in the consumers or before them.
        norm: whether the producer is a layer norm.
    """

    producer: str
    consumers: tuple[str, ...]
    limit: float = math.inf
    rectified: bool = False
    padded: bool = False
    norm: bool = False


@dataclass
class _Found:
    consumers: list[str]
    limit: float = math.inf
    rectified: bool = False
    padded: bool = False


def links(graph: Graph, layers: Collection[str]) -> list[Link]:
    """All links between layers of these paths, in the order they run.

    Args:
        graph: a recorded model.
        layers: paths of the modules that may be scaled; each must run once.
    """
    once = {p for p in layers if len(graph.modules(p)) == 1}
    found: list[Link] = []
    for node in graph:
        norm = node.kind == "call" and node.op == "layer_norm" and _last_axis(node)
        if not norm and (node.kind != "module" or node.op not in _PRODUCERS or node.path not in once):
            continue
        shape = node.outputs[0].shape if node.outputs else ()
        axis = len(shape) - 1 if norm or node.op == "Linear" else 1
        if len(shape) < 2 or (not norm and node.op != "Linear" and len(shape) != 2 + int(node.op[4])):
            continue
        ends = _follow(graph, Ref(node.id), axis, shape[axis], once)
        if ends is None or not ends.consumers:
            continue
        producer = _owner(node) if norm else node.path
        found.append(
            Link(producer, tuple(ends.consumers), ends.limit, ends.rectified, ends.padded, bool(norm))
        )
    return found


def _last_axis(node: Node) -> bool:
    """Whether a layer norm runs over the last axis alone, with a gain and perhaps a shift of its own."""
    names = {name.rpartition(".")[2] for name in node.params.values()}
    return (
        "weight" in names
        and len(node.outputs[0].shape) >= 2
        and list(node.scalars)[:1] == [1]
        and 2 in node.params
    )


def _owner(node: Node) -> str:
    return node.params[2].rpartition(".")[0]


def _follow(graph: Graph, ref: Ref, axis: int, channels: int, once: Iterable[str]) -> _Found | None:
    """Everything that reads a value, or None if a factor cannot pass."""
    found = _Found([])
    pending = [ref]
    while pending:
        value = pending.pop()
        if not graph.users(value):
            return None
        for node, position in graph.users(value):
            if node.kind == "module" and node.op in _PRODUCERS and position == 0 and node.path in once:
                wanted = len(graph.value(value).shape) - 1 if node.op == "Linear" else 1
                if axis != wanted:
                    return None
                found.consumers.append(node.path)
                continue
            if node.kind != "call" or position != 0 or node.params or len(node.outputs) != 1:
                return None
            if len([r for r in node.inputs if r is not None]) != 1:
                return None
            shape = node.outputs[0].shape
            if len(shape) <= axis or shape[axis] != channels or (axis > 1 and len(shape) != axis + 1):
                return None
            if node.op in _CLIPS:
                low, high = _bounds(node)
                if low != 0:
                    return None
                found.limit, found.rectified = min(found.limit, high), True
            elif node.op not in _HOMOGENEOUS:
                return None
            if not _passes(node, len(graph.value(value).shape), axis):
                return None
            found.padded = found.padded or node.op == "pad"
            found.rectified = found.rectified or node.op == "relu"
            pending.append(Ref(node.id))
    return found


def _passes(node: Node, rank: int, axis: int) -> bool:
    """Whether a call whose shapes fit leaves channels apart from each other."""
    if node.op == "mean" and len(node.outputs[0].shape) < rank:
        return not {float(axis), float(axis - rank)} & set(node.scalars.values())
    if node.op == "pad":
        mode = next(i for i in range(1, len(node.inputs) + 1) if i not in node.scalars)
        return node.scalars.get(mode + 1, 0.0) == 0.0
    return node.op != "flatten" or axis < rank - 1


def _bounds(node: Node) -> tuple[float, float]:
    """Lower and upper bound of a clip; nan where unknown."""
    if node.op == "relu6":
        return 0.0, 6.0
    return node.scalars.get(1, math.nan), node.scalars.get(2, math.nan if node.op == "hardtanh" else math.inf)

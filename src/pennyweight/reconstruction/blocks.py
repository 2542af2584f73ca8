"""Parts of a network that are reconstructed together: residual blocks, branches that join, single layers."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from itertools import pairwise

from torch import nn

from pennyweight.graph.graph import Graph, Node, Ref

SMALL = 4  # a chain of so many layers without a branch is still one block


@dataclass(frozen=True, slots=True)
class Unit:
    """A module that is called once, has one result, and is reconstructed as a whole.

    Attributes:
        path: of the module.
        layers: paths of its layers, in the order they run.
        low, high: what its result is clipped to next, where nothing else reads it.
    """

    path: str
    layers: tuple[str, ...]
    low: float = -math.inf
    high: float = math.inf


def find_units(
    graph: Graph, model: nn.Module, layers: Collection[str], *, whole_blocks: bool = True
) -> list[Unit]:
    """Cut a network into units, in the order they run.

    A module is a block if all that others read of it is one tensor, and it cannot be cut in two between its children:
    wherever one of them ends, more than one value that depends on a layer is still needed (a shortcut, a branch). A
    module of a few layers in a row is a block too. What belongs to no block is a unit of one layer. Layers that run
    more than once are in no unit.

    Args:
        graph: the recorded model.
        model: gives the order of modules inside of each other.
        layers: paths of the layers to reconstruct.
        whole_blocks: single layers only, if not.
    """
    once = {p for p in layers if len(graph.modules(p)) == 1}
    first = {p: graph.modules(p)[0].id for p in once}
    units = _cut(graph, model, "", once, whole_blocks)
    found = [_clipped(graph, Unit(path, tuple(sorted(own, key=first.__getitem__)))) for path, own in units]
    return sorted(found, key=lambda unit: first[unit.layers[0]])


def _cut(
    graph: Graph, model: nn.Module, path: str, once: Collection[str], whole: bool
) -> list[tuple[str, frozenset[str]]]:
    own = frozenset(p for p in once if _within(p, path))
    if not own:
        return []
    if path in once:
        return [(path, own)]
    pieces = []
    for name, child in model.named_children():
        pieces += _cut(graph, child, f"{path}.{name}".lstrip("."), once, whole)
    if not whole or not path or not _closed(graph, path):
        return pieces
    short = len(own) <= SMALL and all(len(piece[1]) == 1 for piece in pieces)
    return [(path, own)] if short or not _separable(graph, [p for p, _ in pieces]) else pieces


def _within(path: str, around: str) -> bool:
    return not around or path == around or path.startswith(f"{around}.")


def _nodes(graph: Graph, path: str) -> list[Node]:
    return [n for n in graph if n.kind in ("module", "call") and _within(n.path, path)]


def _closed(graph: Graph, path: str) -> bool:
    """Whether the nodes of a module follow each other and one of their results is read outside."""
    nodes = _nodes(graph, path)
    ids = {n.id for n in nodes}
    if len(ids) != max(ids) - min(ids) + 1:
        return False
    read = {
        Ref(n.id, i)
        for n in nodes
        for i in range(len(n.outputs))
        if any(user.id not in ids for user, _ in graph.users(Ref(n.id, i)))
    }
    return len(read) == 1


def _separable(graph: Graph, pieces: list[str]) -> bool:
    """Whether between any two pieces that follow each other one value is needed alone."""
    depends = _dependent(graph)
    spans = sorted((min(i), max(i)) for i in ([n.id for n in _nodes(graph, p)] for p in pieces))
    for (_, end), (start, _) in pairwise(spans):
        if not any(_alive(graph, depends, at) == 1 for at in range(end, start)):
            return False
    return True


def _dependent(graph: Graph) -> set[Ref]:
    """Values that follow from a layer's result, or from an input that a layer reads."""
    found: set[Ref] = set()
    for node in graph:
        if node.kind == "module" or any(r in found for r in node.inputs if r is not None):
            found.update(Ref(node.id, i) for i in range(len(node.outputs)))
            if node.kind == "module":
                found.update(r for r in node.inputs if r is not None)
    return found


def _alive(graph: Graph, values: Collection[Ref], at: int) -> int:
    """How many of the values made up to node `at` are read behind it."""
    return sum(ref.node <= at and any(user.id > at for user, _ in graph.users(ref)) for ref in values)


def _clipped(graph: Graph, unit: Unit) -> Unit:
    """With the clip that alone reads the unit's result, if there is one."""
    last = _nodes(graph, unit.path)[-1]
    users = graph.users(Ref(last.id))
    if len(users) != 1 or users[0][0].kind != "call":
        return unit
    node = users[0][0]
    if node.op == "relu":
        return Unit(unit.path, unit.layers, 0.0)
    if node.op == "relu6":
        return Unit(unit.path, unit.layers, 0.0, 6.0)
    if node.op == "hardtanh" and {1, 2} <= node.scalars.keys():
        return Unit(unit.path, unit.layers, node.scalars[1], node.scalars[2])
    return unit

"""Which layer gets which format: an exact choice over measured damage, sizes and times."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pennyweight.errors import SolverError
from pennyweight.graph import ops
from pennyweight.graph.graph import Graph, Ref
from pennyweight.plan import Plan


@dataclass(frozen=True)
class Choice:
    """One format for one group of layers.

    Attributes:
        form: its name.
        damage: what it does to the output; adds up over groups.
        costs: by name ("ns", "bytes", "bops"); add up too.
        integer: whether the layers read and write codes; a change along an edge costs a conversion.
    """

    form: str
    damage: float
    costs: Mapping[str, float]
    integer: bool = True


@dataclass(frozen=True)
class Edge:
    """Values that go from one group to another, and what converting them between codes and floats costs, in ns."""

    source: int
    target: int
    ns: float


def solve(
    groups: Sequence[Sequence[Choice]],
    *,
    minimize: str,
    limits: Mapping[str, float] | None = None,
    edges: Sequence[Edge] = (),
) -> list[int] | None:
    """The cheapest choice for every group: binaries x_{g,c}, `sum_c x_{g,c} = 1`.

        min sum cost x   such that   sum damage x <= limit,  sum costs x <= limits

    A conversion on an edge counts (`z >= |integer(source) - integer(target)|`) where "ns" is minimised or limited.

    Args:
        groups: the choices of each group of tied layers.
        minimize: "damage", or the name of a cost.
        limits: greatest sums by name, "damage" among them.
        edges: between groups.

    Returns:
        The number of the choice of each group; None where no choice keeps the limits.

    Raises:
        SolverError: if scipy is missing, or the solver fails.
    """
    try:
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import csr_matrix
    except ImportError as error:
        raise SolverError(
            "choosing formats layer by layer needs scipy", hint="pip install pennyweight[tune]"
        ) from error
    limits = dict(limits or {})
    flat = [(g, c) for g, choices in enumerate(groups) for c in choices]
    timed = minimize == "ns" or "ns" in limits
    used = [e for e in edges if e.source != e.target] if timed else []
    count = len(flat) + len(used)
    where: dict[int, list[int]] = {}
    for i, (g, _) in enumerate(flat):
        where.setdefault(g, []).append(i)

    def total(name: str) -> np.ndarray[Any, Any]:
        row = np.zeros(count)
        row[: len(flat)] = [c.damage if name == "damage" else c.costs.get(name, 0.0) for _, c in flat]
        if name == "ns":
            row[len(flat) :] = [e.ns for e in used]
        return row

    rows, low, high = [], [], []
    for g in range(len(groups)):
        row = np.zeros(count)
        row[where[g]] = 1
        rows.append(row)
        low.append(1.0)
        high.append(1.0)
    for k, edge in enumerate(used):
        for sign in (1, -1):  # integer(source) - integer(target) - z <= 0, and the other way round
            row = np.zeros(count)
            for group, s in ((edge.source, sign), (edge.target, -sign)):
                for i in where[group]:
                    row[i] += s * float(flat[i][1].integer)
            row[len(flat) + k] = -1
            rows.append(row)
            low.append(-np.inf)
            high.append(0.0)
    for name, limit in limits.items():
        row = total(name)
        scale = float(np.abs(row).max()) or 1.0
        rows.append(row / scale)
        low.append(-np.inf)
        high.append(limit / scale * (1 + 1e-9))
    objective = total(minimize)
    objective = objective / (float(np.abs(objective).max()) or 1.0)
    if minimize != "damage":  # of equally cheap choices the one that hurts least
        damage = total("damage")
        objective = objective + 1e-7 * damage / (float(damage.max()) or 1.0)
    found = milp(
        objective,
        integrality=np.concatenate([np.ones(len(flat)), np.zeros(len(used))]),
        bounds=Bounds(0, 1),
        constraints=LinearConstraint(csr_matrix(np.array(rows)), np.array(low), np.array(high)),
        options={"mip_rel_gap": 1e-9},
    )
    if found.status == 2:
        return None
    if found.x is None:
        raise SolverError(f"the choice of formats was not found: {found.message}")
    return [int(np.argmax([found.x[i] for i in where[g]])) for g in range(len(groups))]


def tied_groups(plan: Plan, layers: Sequence[str]) -> list[list[str]]:
    """Layers that must share a format: those that read the same values, on one grid, and so share a quantizer."""
    parent = {name: name for name in layers}

    def root(name: str) -> str:
        while parent[name] != name:
            name = parent[name]
        return name

    owner = {str(site): n for n in layers for site in plan.layers[n].sites()}
    for group in plan.ties:
        members = [owner[str(site)] for site in group if str(site) in owner]
        for other in members[1:]:
            parent[root(other)] = root(members[0])
    found: dict[str, list[str]] = {}
    for name in layers:
        found.setdefault(root(name), []).append(name)
    return list(found.values())


def conversions(graph: Graph, groups: Sequence[Sequence[str]], ns_per_value: float) -> list[Edge]:
    """Edges between groups that values flow along, through sums, moves and pools, with the time of converting them."""
    index = {name: g for g, names in enumerate(groups) for name in names}
    edges: dict[tuple[int, int], float] = {}
    through = ops.MOVES | ops.SLICES | ops.JOINS | ops.CLIPS | ops.UNARY | ops.BINARY | ops.POOLS
    for node in graph:
        if node.name not in index or node.kind not in ("module", "call"):
            continue
        stack: list[Ref] = [r for r in node.inputs if r is not None]
        seen: set[Ref] = set()
        while stack:
            ref = stack.pop()
            if ref in seen:
                continue
            seen.add(ref)
            producer = graph.producer(ref)
            if producer.name in index and producer.kind in ("module", "call"):
                key = index[producer.name], index[node.name]
                values = float(np.prod(graph.value(ref).shape))
                edges[key] = max(edges.get(key, 0.0), values * ns_per_value)
            elif (producer.kind == "call" and producer.op in through) or producer.kind == "module":
                stack += [r for r in producer.inputs if r is not None]
    return [Edge(a, b, ns) for (a, b), ns in edges.items()]

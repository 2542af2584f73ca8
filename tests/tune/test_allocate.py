"""The exact choice of formats against trying all of them."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from pennyweight.pipeline import prepare, state
from pennyweight.tune.allocate import Choice, Edge, conversions, solve, tied_groups


def instance(seed, groups=5, choices=3):
    rng = np.random.default_rng(seed)
    made = [
        [
            Choice(
                str(c), float(rng.random()), {"ns": float(rng.random()), "bytes": float(rng.random())}, c != 0
            )
            for c in range(choices)
        ]
        for _ in range(groups)
    ]
    edges = [Edge(i, i + 1, float(rng.random())) for i in range(groups - 1)] + [Edge(0, groups - 1, 0.3)]
    return made, edges


def value(groups, edges, picked, name):
    chosen = [g[i] for g, i in zip(groups, picked, strict=True)]
    total = sum(c.damage if name == "damage" else c.costs[name] for c in chosen)
    if name == "ns":
        total += sum(e.ns for e in edges if chosen[e.source].integer != chosen[e.target].integer)
    return total


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("minimize", "limits"), [
    ("ns", {"damage": 2.0}), ("bytes", {"damage": 2.2, "ns": 4.0}), ("damage", {"bytes": 2.0}), ("damage", {}),
])  # fmt: skip
def test_it_is_the_best_of_all(seed, minimize, limits):
    groups, edges = instance(seed)
    every = list(itertools.product(*(range(len(g)) for g in groups)))
    allowed = [p for p in every if all(value(groups, edges, p, n) <= v for n, v in limits.items())]
    picked = solve(groups, minimize=minimize, limits=limits, edges=edges)
    if not allowed:
        assert picked is None
        return
    best = min(value(groups, edges, p, minimize) for p in allowed)
    assert value(groups, edges, picked, minimize) == pytest.approx(best, rel=1e-5)
    assert all(value(groups, edges, picked, n) <= v * (1 + 1e-6) for n, v in limits.items())


def test_limits_that_nothing_keeps_give_none():
    groups, _ = instance(0)
    assert solve(groups, minimize="ns", limits={"bytes": -1.0}) is None


class Siblings(nn.Module):
    """Two layers that read the same tensor, and one that reads their sum."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.c((self.a(x) + self.b(x)).relu())


def test_layers_that_share_a_quantizer_are_one_group():
    prepared = prepare(Siblings().eval(), torch.randn(4, 8), "int8")
    plan = state(prepared).plan
    groups = tied_groups(plan, ["a", "b", "c"])
    assert sorted(map(sorted, groups)) == [["a", "b"], ["c"]]
    edges = conversions(state(prepared).graph, [["a"], ["b"], ["c"]], 2.0)
    assert {(e.source, e.target) for e in edges} == {(0, 2), (1, 2)}
    assert all(e.ns == 2.0 * 4 * 8 for e in edges)

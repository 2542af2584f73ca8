"""The recorder: who feeds whom in one eager run, and nothing left behind."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pennyweight as pw
from pennyweight.graph.graph import Ref


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2)
        self.raw = nn.Parameter(torch.randn(4, 4))

    def forward(self, x, flip: bool = False):
        y = self.norm(self.conv(x))
        y = y + y.relu()
        y = y.mean((2, 3))
        if flip:
            y = -y
        return self.head(F.linear(y, self.raw))


X = torch.randn(2, 3, 6, 6)


def named(graph):
    return {node.name: node for node in graph}


def test_modules_and_calls_by_name():
    graph = named(pw.record(Net().eval(), X))
    assert {"conv", "norm", "head", ":add/0", ":mean/0", ":linear/0"} <= set(graph)
    assert graph["conv"].kind == "module"
    assert graph["conv"].op == "Conv2d"
    assert graph[":linear/0"].kind == "call"
    assert graph[":linear/0"].params[1] == "raw"


def test_edges():
    recorded = pw.record(Net().eval(), X)
    graph = named(recorded)
    assert recorded.producer(graph["norm"].inputs[0]).name == "conv"
    both = graph[":add/0"].inputs
    assert recorded.producer(both[0]).name == "norm"
    assert recorded.producer(both[1]).op == "relu"
    users = recorded.users(Ref(graph["norm"].id, 0))
    assert len(users) == 2
    assert recorded.value(both[0]).shape == (2, 4, 4, 4)


def test_only_what_ran_is_there():
    model = Net().eval()
    assert not any(n.op == "neg" for n in pw.record(model, X))
    assert any(n.op == "neg" for n in pw.record(model, (X, True)))


def test_calls_are_counted_by_module():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(4, 4), nn.ReLU())

        def forward(self, x):
            x = x + 1
            x = self.inner(x) + self.inner(x * 2)
            return x + x

    names = [n.name for n in pw.record(Twice(), torch.randn(2, 4)) if n.op == "add"]
    assert names == [":add/0", ":add/1", ":add/2"]
    layers = [n for n in pw.record(Twice(), torch.randn(2, 4)) if n.name == "inner.0"]
    assert len(layers) == 2  # one module, two places


def test_nothing_is_left_behind():
    model = Net().eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    pw.record(model, X)
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert (X + 1).sum() == (X + 1).sum()


def test_what_the_model_raises_comes_through():
    class Broken(nn.Module):
        def forward(self, x):
            return x @ x.new_ones(999, 1)

    model = Broken()
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        pw.record(model, X)
    assert all(not m._forward_hooks for m in model.modules())


def test_inputs_of_every_shape():
    class Pairs(nn.Module):
        def forward(self, pair, *, extra):
            return {"sum": pair[0] + pair[1]["b"] + extra, "list": [extra * 2]}

    batch = {"pair": (torch.ones(2), {"b": torch.ones(2)}), "extra": torch.ones(2)}
    graph = pw.record(Pairs(), batch)
    adds = [n for n in graph if n.op == "add"]
    assert len(adds) == 2
    assert all(r is not None for n in adds for r in n.inputs)

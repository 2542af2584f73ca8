"""Links are found where a factor can pass, and nowhere else."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pennyweight.graph.links import Link, links
from pennyweight.pipeline import record


def found(model, x):
    paths = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    return links(record(model.eval(), x), paths)


X = torch.randn(2, 4, 8, 8)


def net(*between, second=None):
    return nn.Sequential(nn.Conv2d(4, 8, 3), *between, second or nn.Conv2d(8, 4, 3))


@pytest.mark.parametrize(
    ("between", "link"),
    [
        ([], Link("0", ("1",))),
        ([nn.ReLU()], Link("0", ("2",), rectified=True)),
        ([nn.ReLU6()], Link("0", ("2",), 6.0, True)),
        ([nn.Hardtanh(0, 2.5), nn.MaxPool2d(2)], Link("0", ("3",), 2.5, True)),
        ([nn.LeakyReLU(), nn.Dropout(), nn.AvgPool2d(2)], Link("0", ("4",))),
        ([nn.ZeroPad2d(1)], Link("0", ("2",), padded=True)),
    ],
)
def test_what_a_factor_passes(between, link):
    assert found(net(*between), X) == [link]


@pytest.mark.parametrize(
    "between",
    [[nn.GELU()], [nn.Sigmoid()], [nn.Hardtanh()], [nn.ConstantPad2d(1, 2.0)], [nn.PixelShuffle(2), nn.Conv2d(2, 8, 1)],
     [nn.Softmax(1)]],
)  # fmt: skip
def test_what_it_does_not(between):
    assert "0" not in [link.producer for link in found(net(*between), X)]


def test_pooled_and_flattened():
    head = nn.Sequential(
        nn.Conv2d(4, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)
    )
    assert found(head, X) == [Link("0", ("4",), rectified=True)]
    spread = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Flatten(), nn.Linear(288, 3))
    assert found(spread, X) == []


class Branches(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.how = how

    def forward(self, x):
        y = F.relu6(self.a(x))
        if self.how == "both read":
            return self.b(y) + self.c(y)
        if self.how == "also summed":
            return self.b(y) + y
        if self.how == "run twice":
            return self.b(self.a(y))
        if self.how == "averaged over channels":
            return self.b(y.mean(1, keepdim=True).expand(-1, 4, -1, -1))
        return self.b(y), y


def test_branches():
    assert Link("a", ("b", "c"), 6.0, True) in found(Branches("both read"), X)
    for how in ("also summed", "run twice", "averaged over channels", "also given back"):
        assert "a" not in [link.producer for link in found(Branches(how), X)], how


def test_layer_norms():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.q, self.k = nn.LayerNorm(6), nn.Linear(6, 6), nn.Linear(6, 4)

        def forward(self, x):
            y = self.norm(x)
            return self.q(y) * self.k(y).sum()

    assert found(Block(), torch.randn(2, 3, 6)) == [Link("norm", ("q", "k"), math.inf, norm=True)]

"""Moments behind activations against samples, and ranges and biases without data against those of data."""

import math

import pytest
import torch
from torch import nn

import pennyweight as pw
from pennyweight.pipeline import calibrate, prepare
from pennyweight.recipe import Recipe
from pennyweight.reconstruction.normals import Channels


@pytest.mark.parametrize(("low", "high"), [(0, math.inf), (0, 6), (-1, 2), (-math.inf, math.inf)])
def test_moments_of_clipped_normals(low, high):
    gen = torch.Generator().manual_seed(0)
    mean, deviation = torch.tensor([-3.0, 0.0, 1.0, 5.0, 2.0]), torch.tensor([1.0, 2.0, 0.5, 3.0, 1e-15])
    x = (mean.double() + deviation * torch.randn(400_000, 5, generator=gen, dtype=torch.float64)).clamp(
        low, high
    )
    found = Channels.normal(mean.double(), deviation.double()).clipped(low, high)
    torch.testing.assert_close(found.mean, x.mean(0), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(found.variance, x.var(0), rtol=2e-2, atol=1e-2)
    assert bool((found.hi <= high).all())
    assert bool((found.lo >= low).all())


def trained(width=12):
    """A network whose norms hold the statistics of its inputs, which are standard normal."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.na = nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width)
            self.b, self.nb = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
            self.c, self.head = nn.Conv2d(width, width, 1), nn.Linear(width, 4)

        def forward(self, x):
            x = self.na(self.a(x)).relu()
            x = (x + self.nb(self.b(x))).clamp(0, 6)
            return self.head(self.c(x).mean((2, 3)))

    torch.manual_seed(0)
    model = Net()
    with torch.no_grad():
        for norm in (model.na, model.nb):
            norm.bias.normal_(0.5, 0.5)
            norm.weight.uniform_(0.5, 1.5)
            norm.momentum = None
        x = torch.randn(256, 3, 12, 12)
        model.train()(x)
    return model.eval(), x


def test_without_data_as_with_data():
    model, x = trained()
    free = Recipe.preset("int8-data-free")
    result = pw.quantize(model, None, free, example=x[:4], progress=False)
    data = pw.quantize(model, [x], "int8", progress=False)
    with torch.no_grad():
        want = model(x)
        drift = [float((m(x) - want).norm() / want.norm()) for m in (result, data)]
    assert drift[0] < max(0.05, 3 * drift[1])
    rules = {e.site: e.data["rule"] for e in pw.journal(result).of("range")}
    assert rules.pop("a:input") == "minmax"
    assert set(rules.values()) == {"norm"}


def test_analytic_corrections_are_those_of_data():
    """They correlate by more than 0.9 in every layer behind a norm."""
    model, x = trained()
    text = """
[[rules]]
weight = "int4n[*]"
input = "uint8[*]+z"
[[passes]]
pass = "fold_batch_norm"
[[passes]]
pass = "calibrate"
[[passes]]
pass = "solve"
[[passes]]
pass = "correct_bias"
"""
    shifts = []
    for source in ("data", "norms"):
        prepared = prepare(model, x[:4], Recipe.parse(f'{text}source = "{source}"\n'))
        calibrate(prepared, [x], progress=False)
        shifts.append(
            {
                n: m.bias_shift
                for n, m in prepared.named_modules()
                if getattr(m, "bias_shift", None) is not None
            }
        )
    assert list(shifts[0]) == list(shifts[1]) == ["a", "b", "c", "head"]
    for name in ("b", "c", "head"):
        both = torch.stack([s[name] for s in shifts])
        assert float(torch.corrcoef(both)[0, 1]) > 0.9


def test_real_data_are_used_where_given():
    """The stand-in is for calls without any batch."""
    model, x = trained()
    result = pw.quantize(model, [x * 3], "int8-data-free", example=x[:2], progress=False)
    assert pw.journal(result).last("range", "a:input").data["hi"] > 2.5 * float(x[:2].max())


def test_other_recipes_need_batches():
    model, x = trained()
    with pytest.raises(pw.errors.EmptyCalibration):
        pw.quantize(model, None, "int8", example=x[:2], progress=False)

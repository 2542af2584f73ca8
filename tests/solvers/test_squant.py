"""SQuant: errors cancel in rows and kernels, and cancel them fast."""

import time

import pytest
import torch
from torch import nn

import pennyweight as pw
from pennyweight.errors import SolverError, SpecError
from pennyweight.ranges import ranges
from pennyweight.recipe import Recipe
from pennyweight.solvers import solvers
from pennyweight.solvers.squant import squant
from pennyweight.spec import QuantSpec

MINMAX = ranges["minmax"]()


def errors(weight, q):
    return (q.dequantize() - weight) / q.scales()


@pytest.mark.parametrize("text", ["int4[1,*]", "int4n[*]", "int3n[1,*]", "int8n[1,*]", "int4[1,*]+z"])
@pytest.mark.parametrize("taps", [1, 9])
def test_sums_of_errors_are_small(text, taps):
    weight = torch.randn(24, 16 * taps, generator=torch.Generator().manual_seed(0))
    weight += 0.1  # so that nearest errors do not cancel by themselves
    spec = QuantSpec.parse(text)
    q, nearest = squant(weight, spec, MINMAX, taps=taps), solvers["rtn"](weight, spec, MINMAX)
    e = errors(weight, q)
    assert float(e.sum(1).abs().max()) <= 0.5 + 1e-3
    assert float(errors(weight, nearest).sum(1).abs().max()) > 1
    assert float(e.unflatten(1, (-1, taps)).sum(-1).abs().max()) <= 1 + 1e-3
    assert float(e.abs().max()) <= 1 + 1e-3
    assert int((q.codes != nearest.codes).sum()) < 0.5 * q.codes.numel()


def test_codes_stay_on_the_grid():
    spec = QuantSpec.parse("int2n[1,*]")
    q = squant(torch.tensor([[1.0, 0.9, 0.8, 0.9, 0.7, 0.9]]), spec, MINMAX)
    assert int(q.codes.max()) <= 1


def test_means_stay():
    """Inputs of one mean: the mean output is that of the float weight."""
    torch.manual_seed(0)
    layer = nn.Conv2d(16, 16, 3, bias=False)
    x = torch.rand(16, 16, 12, 12)
    drift = []
    for solver in ("rtn", "squant"):
        text = f'[[rules]]\nweight = "int3n[1,*]"\n[[passes]]\npass = "solve"\nsolver = "{solver}"\n'
        result = pw.quantize(layer, [x], Recipe.parse(text), progress=False)
        with torch.no_grad():
            drift.append(float((result(x) - layer(x)).mean((0, 2, 3)).abs().mean()))
    assert drift[1] < 0.3 * drift[0]


def test_it_takes_no_time():
    """A weight of the size of ResNet-20's, 270,000 numbers."""
    weight, spec = torch.randn(64 * 7, 64 * 9 + 27), QuantSpec.parse("int4[1,*]")
    start = time.perf_counter()
    squant(weight, spec, MINMAX, taps=9)
    assert time.perf_counter() - start < 1


def test_refusals():
    weight = torch.randn(4, 9)
    with pytest.raises(SpecError, match="consecutive"):
        squant(weight, QuantSpec.parse("nf4[1,*]"), MINMAX)
    with pytest.raises(SolverError, match="kernels of 4"):
        squant(weight, QuantSpec.parse("int4[1,*]"), MINMAX, taps=4)

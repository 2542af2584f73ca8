"""Coordinate descent: never behind GPTQ by the measure of both, on every kind of grid and scale."""

import pytest
import torch

from pennyweight.errors import SolverError
from pennyweight.ranges import ranges
from pennyweight.solvers import input_solvers
from pennyweight.solvers.descent import FRACTIONS, REFITTED, descent
from pennyweight.solvers.gptq import gptq
from pennyweight.spec import QuantSpec

SPECS = [
    "int4[1,*]", "int4[1,*]+z", "int3[16]", "int2[16]+z", "uint3[*]+z", "int4[*]", "int4[2,*]", "int4[16]^fp16",
    "nf4[16]", "pot4[1,*]", "int4[16]+zf", "fp4_e2m1[16]^e8m0", "int4[16]^(uint8[*])",
]  # fmt: skip


def problem(rows=24, columns=48, groups=1, seed=0):
    """A weight, and the second moments of correlated inputs of unlike size."""
    gen = torch.Generator().manual_seed(seed)
    mix = torch.randn(groups, columns, columns, generator=gen) / columns**0.5
    x = torch.randn(groups, 600, columns, generator=gen) @ mix * torch.logspace(-1, 1, columns)
    gram = x.mT @ x / x.shape[1]
    return torch.randn(rows, columns, generator=gen), gram if groups > 1 else gram[0]


def damped(weight, q, gram, damp=0.01):
    """What GPTQ and descent minimise."""
    h = gram.reshape(-1, *gram.shape[-2:]).double()
    h = h + damp * torch.diag_embed(h.diagonal(dim1=-2, dim2=-1).mean(-1, True).expand(h.shape[:2]))
    error = (q.dequantize() - weight).double().reshape(len(h), -1, h.shape[-1])
    return float(((error @ h) * error).sum())


@pytest.mark.parametrize("text", SPECS)
@pytest.mark.parametrize("rule", ["minmax", "mse"])
def test_errors_fall_below_those_of_gptq(text, rule):
    spec, (weight, gram) = QuantSpec.parse(text), problem()
    start = gptq(weight, spec, ranges[rule](), gram)
    q = descent(weight, spec, ranges[rule](), gram)
    assert q.codes.dtype == start.codes.dtype and q.codes.shape == start.codes.shape
    assert q.scales().shape == start.scales().shape and q.spec == spec
    assert (q.zero is None) == (start.zero is None)
    share = 0.95 if spec.block and spec.scale in REFITTED else 1.0  # one scale for all leaves little to find
    assert damped(weight, q, gram) < share * damped(weight, start, gram)


@pytest.mark.parametrize("text", ["int4[1,*]", "int4[1,*]+z", "int4[*]", "int4[3,*]"])
def test_rows_with_inputs_of_their_own(text):
    """As for depthwise convolutions; where rows share no scale, each is solved as if alone."""
    spec, (weight, gram) = QuantSpec.parse(text), problem(rows=12, columns=9, groups=12)
    q = descent(weight, spec, ranges["mse"](), gram)
    share = 0.9 if spec.block else 1.0
    assert damped(weight, q, gram) < share * damped(weight, gptq(weight, spec, ranges["mse"](), gram), gram)
    if spec.block[:1] == (1,):
        alone = [descent(w[None], spec, ranges["mse"](), g) for w, g in zip(weight, gram, strict=True)]
        assert torch.equal(torch.cat([a.codes for a in alone]), q.codes)
        torch.testing.assert_close(torch.cat([a.scales() for a in alone]), q.scales())


def test_no_single_code_can_be_bettered():
    """What is left is a minimum in every coordinate, for codes and scales."""
    spec, (weight, gram) = QuantSpec.parse("int3[1,*]"), problem(rows=3, columns=12)
    q = descent(weight, spec, ranges["mse"](), gram, rounds=50, sweeps=50)
    least = damped(weight, q, gram)
    for row in range(3):
        for column in range(12):
            for step in (-1, 1):
                code = int(q.codes[row, column]) + step
                if -4 <= code <= 3:
                    other = q.codes.clone()
                    other[row, column] = code
                    assert damped(weight, type(q)(other, q.scale, q.zero, spec), gram) >= least * (1 - 1e-5)
    for factor in (0.999, 1.001):
        assert damped(weight, type(q)(q.codes, q.scales() * factor, q.zero, spec), gram) > least


def test_it_finds_the_best_codes_of_short_rows():
    """Of nine weights: at most a tenth above the best of 3^9 codes under its own scale, on average."""
    spec, (weight, gram) = QuantSpec.parse("ternary[1,*]"), problem(rows=8, columns=9, groups=8)
    q = descent(weight, spec, ranges["mse"](), gram)
    h = gram.double() + 0.01 * torch.diag_embed(
        gram.double().diagonal(dim1=-2, dim2=-1).mean(-1, True).expand(8, 9)
    )
    every = torch.cartesian_prod(*[torch.tensor([-1.0, 0.0, 1.0])] * 9).double()
    total = 0.0
    for w, s, matrix in zip(weight.double(), q.scales().double(), h, strict=True):
        error = every * s - w
        total += float(((error @ matrix) * error).sum(-1).min())
    assert damped(weight, q, gram) < 1.1 * total


@pytest.mark.parametrize("text", ["int4[1,*]+z", "int4[2,*]", "nf4[16]"])
def test_scales_tried_apart_give_what_they_give_together(text, monkeypatch):
    """Large weights are given to GPTQ under few scales at once."""
    spec, (weight, gram) = QuantSpec.parse(text), problem()
    together = descent(weight, spec, ranges["mse"](), gram)
    monkeypatch.setattr("pennyweight.solvers.descent.TOGETHER", 2 * weight.numel())
    apart = descent(weight, spec, ranges["mse"](), gram)
    assert torch.equal(together.codes, apart.codes) and torch.equal(together.scales(), apart.scales())


def test_inputs_that_are_never_seen_and_weights_of_zero():
    weight, gram = problem()
    weight[3], gram[:, 5], gram[5] = 0.0, 0.0, 0.0
    q = descent(weight, QuantSpec.parse("int4[1,*]"), ranges["minmax"](), gram)
    assert bool(torch.isfinite(q.dequantize()).all()) and not bool(q.dequantize()[3].any())
    none = descent(weight, QuantSpec.parse("int4[1,*]"), ranges["minmax"](), torch.zeros_like(gram))
    assert bool(torch.isfinite(none.dequantize()).all())


def test_bad_options_are_named():
    weight, gram = problem()
    assert input_solvers["descent"] is descent and FRACTIONS[0] == 1.0
    for fractions in ((), (1.0, 0.0)):
        with pytest.raises(SolverError, match="fractions"):
            descent(weight, QuantSpec.parse("int4[1,*]"), ranges["minmax"](), gram, fractions=fractions)
    with pytest.raises(SolverError, match="fit"):
        descent(weight, QuantSpec.parse("int4[1,*]"), ranges["minmax"](), gram[:5, :5])

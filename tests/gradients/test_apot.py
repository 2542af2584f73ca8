"""Normalised weights: levels of (w - mean) / deviation, the gradients of the paper, nothing left of it once converted."""

import pytest
import torch
from torch import nn

import pennyweight as pw
from pennyweight import training
from pennyweight.formats import grids
from pennyweight.gradients.apot import APoT
from pennyweight.nn.rounding import trained
from pennyweight.passes.calibrate import Calibrate
from pennyweight.passes.fold_batch_norm import FoldBatchNorm
from pennyweight.passes.solve import Solve
from pennyweight.passes.train import Train
from pennyweight.plan import Rule
from pennyweight.recipe import Recipe
from pennyweight.spec import QuantSpec

SPEC = QuantSpec.parse("apot4[*]")


def test_values_and_gradients_by_hand():
    torch.manual_seed(0)
    w = (torch.randn(6, 40) * 0.02 + 0.5).requires_grad_()
    estimator = APoT(alpha=1.5)
    held = {"scale": estimator.first(w.detach(), SPEC).scale.requires_grad_(), "zero": torch.zeros(1, 1)}
    assert float(held["scale"].detach()) == 1.5
    y, g = estimator.round(w, held, SPEC, w.numel()), torch.randn(6, 40)
    y.backward(g)
    u = ((w - w.mean()) / w.std()).detach()
    t = u / 1.5
    levels = grids["apot4"].levels()
    level = levels[(t.clamp(-1, 1).unsqueeze(-1) - levels).abs().argmin(-1)]
    assert torch.allclose(y.detach(), 1.5 * level, atol=1e-6)
    inside = t.abs() <= 1
    assert 0.8 < float(inside.float().mean()) < 0.95
    assert torch.allclose(w.grad, g * inside / w.detach().std(), rtol=1e-4)
    assert float(held["scale"].grad) == pytest.approx(
        float((g * torch.where(inside, level - t, level)).sum()), rel=1e-4
    )


def test_neither_size_nor_shift_of_the_weights_matters_only_without_it():
    torch.manual_seed(1)
    w = torch.randn(4, 30)
    held = {"scale": torch.full((1, 1), 2.0), "zero": torch.zeros(1, 1)}
    on, off = APoT(), APoT(normalize=False)
    assert torch.allclose(on.round(w, held, SPEC, 120), on.round(7 * w + 3, held, SPEC, 120), atol=1e-5)
    assert not torch.allclose(off.round(w, held, SPEC, 120), off.round(7 * w + 3, held, SPEC, 120))
    assert torch.equal(off.latent(w), w)
    assert torch.equal(on.latent(torch.full((2, 2), 5.0)), torch.zeros(2, 2))


def test_conversion_keeps_the_levels_alone():
    """Norms fold into scales: what was trained and what is converted differ by float rounding alone."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 4)
    )
    with torch.no_grad():
        model[0].weight.mul_(0.01).add_(0.3)
    rules = (Rule("0", weight=QuantSpec.parse("apot4[1,*]")), Rule("4", weight=QuantSpec.parse("int8n[1,*]")))
    passes = (FoldBatchNorm(), Train("apot", "clipped"), Calibrate(), Solve())
    x, y = torch.randn(32, 2, 6, 6), torch.arange(32) % 4
    prepared = training.prepare(model, x, Recipe("apot", rules, passes))
    pw.calibrate(prepared, [x])
    assert torch.equal(trained(prepared[0])["weight"].learned["scale"].detach(), torch.full((8, 1), 3.0))
    training.fit(prepared, lambda: [(x, y)] * 10, epochs=2, lr=0.01, progress=False)
    alpha = trained(prepared[0])["weight"].learned["scale"].detach()
    assert float((alpha - 3).abs().max()) > 0
    prepared.eval()
    with torch.no_grad():
        there, here = prepared(x), pw.convert(prepared)(x)
    assert torch.allclose(there, here, atol=1e-5)

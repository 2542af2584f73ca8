"""Equalization and absorption: the function stays, the ranges agree, per-tensor weights become possible."""

import copy

import pytest
import torch
from torch import nn

import pennyweight as pw
from pennyweight.passes.equalize import Equalize, column_sizes, row_sizes
from pennyweight.passes.fold_batch_norm import FoldBatchNorm
from pennyweight.pipeline import calibrate, prepare
from pennyweight.recipe import Recipe
from pennyweight.reconstruction.capture import floating

RULE = '[[rules]]\nweight = "int8n[*]"\ninput = "uint8[*]+z"\noptional = true\n'
PLAIN = (
    RULE
    + '[[passes]]\npass = "fold_batch_norm"\n[[passes]]\npass = "calibrate"\n[[passes]]\npass = "solve"\n'
)
ABSORB = RULE + "".join(
    f'[[passes]]\npass = "{p}"\n' for p in ("fold_batch_norm", "absorb_bias", "calibrate", "solve")
)
EVEN = PLAIN + '[[passes]]\npass = "equalize"\n'


class Depthwise(nn.Module):
    """Expansion, depthwise, projection; channels of very different size."""

    def __init__(self, act=nn.ReLU6, norm=True):
        super().__init__()
        torch.manual_seed(0)
        bn = nn.BatchNorm2d if norm else lambda c: nn.Identity()
        self.up, self.n1 = nn.Conv2d(3, 16, 1, bias=not norm), bn(16)
        self.mid, self.n2 = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=not norm), bn(16)
        self.down, self.n3 = nn.Conv2d(16, 8, 1, bias=not norm), bn(8)
        self.act, self.head = act(), nn.Linear(8, 5)
        if norm:  # statistics as of standard normal inputs
            with torch.no_grad():
                for m in (self.n1, self.n2, self.n3):
                    m.bias.normal_(0.5, 0.5)
            x = torch.randn(256, 3, 8, 8)
            self.train()
            for m in (self.n1, self.n2, self.n3):
                m.momentum = None
            with torch.no_grad():
                self(x)
                s1, s2 = (2 ** (torch.rand(16) * 6 - 3) for _ in range(2))
                if act is nn.ReLU:
                    for norm_, s in ((self.n1, s1), (self.n2, s2)):
                        norm_.weight *= s
                        norm_.bias *= s
                    self.mid.weight /= s1.view(-1, 1, 1, 1)
                    self.n2.running_mean /= 1
                    self.down.weight /= s2.view(1, -1, 1, 1)
        self.eval()

    def forward(self, x):
        x = self.act(self.n1(self.up(x)))
        x = self.act(self.n2(self.mid(x)))
        return self.head(self.n3(self.down(x)).mean((2, 3)))


def adapted(model, x, recipe=EVEN):
    before = copy.deepcopy(model.state_dict())
    prepared = calibrate(prepare(model, x, Recipe.parse(recipe)), [x], progress=False)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    return prepared


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("act", [nn.ReLU, nn.ReLU6, nn.LeakyReLU])
def test_the_function_stays(act, norm):
    model, x = Depthwise(act, norm), torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    prepared = adapted(model, x)
    with floating(prepared), torch.no_grad():
        got, want = prepared(x), model(x)
    assert float((got - want).norm() / want.norm()) < 2e-3
    assert len(pw.journal(prepared).of("equalize")) == 3


def test_all_three_ranges_of_a_channel_agree():
    model = Depthwise(nn.ReLU)
    prepared = adapted(model, torch.randn(8, 3, 8, 8))
    sizes = [row_sizes(prepared.up), row_sizes(prepared.mid), column_sizes(prepared.down)]
    torch.testing.assert_close(sizes[0], sizes[1], rtol=1e-2, atol=0)
    torch.testing.assert_close(sizes[1], sizes[2], rtol=1e-2, atol=0)
    old = [row_sizes(m) for m in (model.up, model.mid)]
    assert float((old[0] / old[1]).log().abs().max()) > 1


def test_clipped_channels_stay():
    """Where a channel reaches 6 its factor is 1; below, none may pass 6 by its factor."""
    model, x = Depthwise(nn.ReLU6, norm=False), torch.randn(32, 3, 8, 8)
    with torch.no_grad():
        model.up.weight *= torch.logspace(-1, 1.5, 16).view(-1, 1, 1, 1)
    prepared = adapted(model, x)
    tops = model.up(x).amax((0, 2, 3))
    factor = (prepared.up.weight / model.up.weight).flatten(1)[:, 0]
    assert bool((tops >= 6).any())
    assert torch.equal(factor[tops >= 6], torch.ones_like(factor[tops >= 6]))
    assert bool((factor[tops < 6] * tops[tops < 6] <= 6.001).all())
    assert bool((factor[tops < 6] != 1).any())


def test_rescaled_networks_are_rescued():
    """Factors that cancel collapse per-tensor weights; equalized they lose nothing."""
    model, x = Depthwise(nn.ReLU), torch.randn(64, 3, 8, 8)

    def drift(recipe):
        result = pw.quantize(model, [x], Recipe.parse(recipe), progress=False)
        with torch.no_grad():
            return float((result(x) - model(x)).norm() / model(x).norm())

    assert drift(EVEN) < 0.5 * drift(PLAIN)


def test_high_biases_are_absorbed():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3, bias=False), nn.BatchNorm2d(4)
    )
    with torch.no_grad():
        model[1].bias.uniform_(3, 8)
    x = torch.randn(64, 3, 8, 8)
    model.train()
    model[1].momentum = model[4].momentum = None
    model(x)
    recipe = ABSORB
    prepared = adapted(model.eval(), x, recipe)
    with floating(prepared), torch.no_grad():
        got, want = prepared(x), model(x)
    assert float((got - want).norm() / want.norm()) < 0.03  # 0.135 % of the values are cut off
    (event,) = pw.journal(prepared).of("absorb")
    assert event.data["channels"] == 8
    assert prepared[0].bias.max() < model[1].bias.max() - 2.9  # seen as outputs of the folded layer


def test_padded_channels_are_not():
    """Zeros at the border would no longer be zeros."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1)
    ).eval()
    with torch.no_grad():
        model[1].bias.fill_(9)
    recipe = ABSORB
    assert not pw.journal(adapted(model, torch.randn(4, 3, 8, 8), recipe)).of("absorb")


def test_folding_says_what_the_norm_puts_out():
    model, x = Depthwise(nn.ReLU), torch.randn(512, 3, 8, 8)
    from pennyweight.passes import Context

    root = copy.deepcopy(model)
    context = Context(root, pw.record(root, x[:2]), pw.Journal())
    FoldBatchNorm().run(context)
    mean, deviation = context.outputs["up"]
    y = root.up(x).double()
    torch.testing.assert_close(y.mean((0, 2, 3)), mean, rtol=0.1, atol=0.3)
    torch.testing.assert_close(y.std((0, 2, 3)), deviation, rtol=0.1, atol=0.1)


def test_options_round_trip():
    recipe = Recipe(passes=(Equalize(iterations=3, sigmas=5.0),))
    assert Recipe.parse(recipe.to_text()) == recipe

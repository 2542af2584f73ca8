"""Smoothing: the function stays, activations even out, planted outliers no longer hurt."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pennyweight as pw
from pennyweight.pipeline import calibrate, prepare
from pennyweight.recipe import Recipe
from pennyweight.reconstruction.capture import floating

RULES = """
[[rules]]
weight = "int8n[1,*]"
input = "uint8[*]+z"
optional = true

[[passes]]
pass = "fold_batch_norm"

[[passes]]
pass = "calibrate"

[[passes]]
pass = "solve"
"""


def smoothed(**options):
    lines = [f"{k} = {v!r}" for k, v in options.items()]
    return RULES + '\n[[passes]]\npass = "smooth"\n' + "\n".join(lines) + "\n"


class Encoder(nn.Module):
    """Norm first; four channels of the norm are fifty times as large, and their readers' weights as small."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.q, self.k, self.v, self.out = nn.LayerNorm(32), *(nn.Linear(32, 32) for _ in range(4))
        self.norm2, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)
        with torch.no_grad():
            for norm, readers in ((self.norm, (self.q, self.k, self.v)), (self.norm2, (self.up,))):
                norm.weight[:4] *= 50
                norm.bias[:4] *= 50
                for reader in readers:
                    reader.weight[:, :4] /= 50

    def forward(self, x):
        y = self.norm(x)
        x = x + self.out(F.scaled_dot_product_attention(self.q(y), self.k(y), self.v(y)))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Depthwise(nn.Module):
    """Channels of very different range before a depthwise layer, clipped at 6."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.mid = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.down = nn.Conv2d(16, 8, 1)
        with torch.no_grad():
            self.up.weight *= torch.logspace(-1.5, 1, 16).view(-1, 1, 1, 1)
            self.up.bias *= torch.logspace(-1.5, 1, 16)
            self.mid.weight /= torch.logspace(-1.5, 1, 16).view(-1, 1, 1, 1)

    def forward(self, x):
        return self.down(F.relu6(self.mid(F.relu6(self.up(x))))).mean((2, 3))


CASES = {
    "encoder": (Encoder, (32, 10, 32), {"producers": "norms"}),
    "depthwise": (Depthwise, (64, 3, 8, 8), {"producers": "all"}),
}


def data(name):
    kind, shape, options = CASES[name]
    return kind().eval(), torch.randn(shape, generator=torch.Generator().manual_seed(1)), options


@pytest.mark.parametrize("name", list(CASES))
def test_the_function_stays(name):
    model, x, options = data(name)
    before = copy.deepcopy(model.state_dict())
    prepared = calibrate(prepare(model, x, Recipe.parse(smoothed(**options))), [x], progress=False)
    with floating(prepared), torch.no_grad():
        torch.testing.assert_close(prepared(x), model(x), rtol=1e-4, atol=1e-4)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("name", list(CASES))
def test_ranges_that_stand_out_no_longer_hurt(name, tmp_path):
    model, x, options = data(name)
    drift = {}
    for recipe in (RULES, smoothed(**options)):
        result = pw.quantize(model, [x], Recipe.parse(recipe), progress=False)
        with torch.no_grad():
            drift[recipe] = float((result(x) - model(x)).norm() / model(x).norm())
    assert drift[smoothed(**options)] < 0.5 * drift[RULES]
    pw.save(result, tmp_path / "m.safetensors")
    again = pw.load(tmp_path / "m.safetensors", model, x)
    with torch.no_grad():
        assert torch.equal(again(x), result(x))


def test_norms_alone_by_default():
    model, x, _ = data("depthwise")
    result = pw.quantize(model, [x], Recipe.parse(smoothed()), progress=False)
    assert not pw.journal(result).of("smooth")


def test_what_else_reads_a_norm_keeps_it():
    class Post(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.up = nn.LayerNorm(8), nn.Linear(8, 8)

        def forward(self, x):
            y = self.norm(x)
            return y + self.up(y)

    result = pw.quantize(Post(), [torch.randn(4, 8)], Recipe.parse(smoothed()), progress=False)
    assert not pw.journal(result).of("smooth")


def test_refusals():
    with pytest.raises(pw.errors.RecipeError, match="alpha"):
        Recipe.parse(smoothed(alpha=1.5))
    with pytest.raises(pw.errors.RecipeError, match="producers"):
        Recipe.parse(smoothed(producers="some"))

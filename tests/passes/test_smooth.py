"""Smoothing: the function stays, activations even out, planted outliers no longer hurt."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pennyweight as pw
from pennyweight.passes import Context
from pennyweight.passes.calibrate import quantizers
from pennyweight.passes.smooth import Smooth
from pennyweight.passes.trial import halves, held_out
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
    lines = [f"{k} = {json.dumps(v)}" for k, v in options.items()]
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
    for alpha in ([], [0.5, -1.0]):
        with pytest.raises(pw.errors.RecipeError, match="alpha"):
            Recipe.parse(smoothed(alpha=alpha))
    model, x, _ = data("encoder")
    with pytest.raises(pw.errors.EmptyCalibration):
        calibrate(prepare(model, x, Recipe.parse(smoothed(alpha=[0.0, 0.5]))), [], progress=False)


def codes(model, batches, recipe):
    result = pw.quantize(model, batches, Recipe.parse(recipe), progress=False)
    return result.state_dict(), pw.journal(result)


@pytest.mark.parametrize("batches", [1, 4])
def test_the_alpha_of_least_error(batches):
    """Among several it is the one that serves inputs held out; the result is as with that one alone."""
    model, x, options = data("encoder")
    parts = list(x.split(len(x) // batches))
    text = smoothed(alpha=[0.0, 0.5], weights=False, **options)
    assert Recipe.parse(Recipe.parse(text).to_text()) == Recipe.parse(text)
    found, journal = codes(model, parts, text)
    (event,) = journal.of("alpha")
    assert event.data["chosen"] == 0.5
    assert event.data["0.5"] < event.data["0.0"] - 3  # dB
    alone, _ = codes(model, parts, smoothed(alpha=0.5, weights=False, **options))
    assert all(torch.equal(v, alone[k]) for k, v in found.items())


def test_inputs_that_go_further_than_those_seen_speak_against_it():
    """Small channels that are large in every other batch: evened out by one half, they are cut off in the other."""
    model, _, options = data("depthwise")
    gen = torch.Generator().manual_seed(2)
    parts = []
    for i in range(6):
        part = torch.randn(24, 3, 8, 8, generator=gen)
        parts.append(part * (4 if i % 2 else 0.5))
    text = smoothed(alpha=[0.0, 0.6], weights=False, **options)
    found, journal = codes(model, parts, text)
    assert journal.of("alpha")[0].data["chosen"] == 0.0
    assert not journal.of("smooth")
    plain, _ = codes(model, parts, RULES)
    assert all(torch.equal(v, plain[k]) for k, v in found.items())


def test_a_trial_leaves_the_model_as_it_is():
    model, x, options = data("encoder")
    prepared = prepare(model, x, Recipe.parse(RULES))
    st = pw.state(prepared)
    context = Context(prepared, st.graph, st.journal, st.plan, lambda: [x])
    before, events = copy.deepcopy(prepared.state_dict()), list(st.journal.events)
    change = Smooth(alpha=0.5, weights=False, **options).run
    error, without = held_out(context, [change, lambda trial: None], [x[:16], x[16:]])
    assert 0 < error < without
    torch.testing.assert_close(prepared.state_dict(), before, rtol=0, atol=0, equal_nan=True)
    assert st.journal.events == events
    assert not any(q.calibrated or q.active or q.statistics for q in quantizers(prepared).values())
    with torch.no_grad():
        assert torch.equal(prepared(x), model(x))


def test_halves_of_the_inputs():
    assert halves([1, 2, 3]) == ([1, 3], [2])
    x, y = torch.arange(5), torch.arange(10).reshape(5, 2)
    (first,), (second,) = halves([{"x": x, "y": y, "n": 3}])
    assert torch.equal(torch.cat([first["y"], second["y"]]), y)
    assert (len(first["x"]), len(second["x"]), first["n"]) == (2, 3, 3)
    for whole in (torch.zeros(1, 4), (torch.zeros(2), torch.zeros(3)), torch.tensor(1.0)):
        one, other = halves([whole])
        assert one[0] is whole
        assert other[0] is whole

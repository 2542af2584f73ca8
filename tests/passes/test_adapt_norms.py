"""Batch norms adapted to the calibration data: the published mixture, folded or not, and a shift taken back."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import pennyweight as pw
from pennyweight.errors import EmptyCalibration, RecipeError
from pennyweight.passes.adapt_norms import AdaptNorms
from pennyweight.pipeline import calibrate, prepare
from pennyweight.recipe import Recipe
from pennyweight.reconstruction.capture import floating
from pennyweight.training import reestimate_batch_norm

INT8 = Recipe.preset("int8")


def recipe(share, base=INT8):
    return pw.chain(base, AdaptNorms(share))


class Chain(nn.Module):
    """Norms behind a convolution, a grouped, a transposed and a linear layer, and one that cannot be folded."""

    def __init__(self):
        super().__init__()
        self.first, self.norm1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.alone = nn.BatchNorm2d(8)
        self.grouped, self.norm2 = nn.Conv2d(8, 12, 3, groups=4), nn.BatchNorm2d(12, affine=False)
        self.back, self.norm3 = nn.ConvTranspose2d(12, 6, 2, stride=2, groups=2), nn.BatchNorm2d(6)
        self.last, self.norm4 = nn.Linear(6, 5), nn.BatchNorm1d(5)

    def forward(self, x):
        x = self.alone(F.relu(self.norm1(self.first(x))))
        x = F.relu(self.norm2(self.grouped(x)))
        return self.norm4(self.last(F.relu(self.norm3(self.back(x))).mean((2, 3))))


def trained(model):
    """Some state of training, far from what random inputs make of it; eps small enough not to count."""
    gen = torch.Generator().manual_seed(5)
    for norm in (m for m in model.modules() if isinstance(m, _BatchNorm)):
        norm.eps = 1e-12
        norm.running_mean.normal_(0, 0.3, generator=gen)
        norm.running_var.uniform_(0.2, 2, generator=gen)
        if norm.affine:
            norm.weight.data.uniform_(-1.5, 1.5, generator=gen)
            norm.bias.data.normal_(0, 0.5, generator=gen)
    return model.eval()


def mixed(model, x, share):
    """The same in plain PyTorch: every norm takes its share of what reaches it, one after another."""
    model = copy.deepcopy(model)

    def before(norm, args):
        axes = [a for a in range(args[0].ndim) if a != 1]
        norm.running_mean.lerp_(args[0].mean(axes), share)
        norm.running_var.lerp_(args[0].var(axes, unbiased=False), share)

    handles = [m.register_forward_pre_hook(before) for m in model.modules() if isinstance(m, _BatchNorm)]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return model


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_the_published_mixture(share):
    torch.manual_seed(1)
    model, x = trained(Chain()), torch.randn(40, 3, 7, 9) * 2 + 1
    before = copy.deepcopy(model.state_dict())
    prepared = calibrate(prepare(model, x[:4], recipe(share)), [x[:16], x[16:23], x[23:]], progress=False)
    with torch.no_grad(), floating(prepared):
        found, was = prepared(x), model(x)
    wanted = mixed(model, x, share)(x)
    assert (found - wanted).norm() < 1e-4 * wanted.norm()
    assert (was - wanted).norm() > 0.02 * wanted.norm()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    events = {e.site: e.data for e in pw.journal(prepared).events if e.kind == "adapt norm"}
    assert list(events) == ["first", "alone", "grouped", "back", "last"]
    assert all(0 < d["least"] <= d["greatest"] and d["shift"] > 0 for d in events.values())


def test_a_layer_kept_in_16_bits_takes_it_too():
    torch.manual_seed(1)
    model, x = trained(Chain()), torch.randn(40, 3, 7, 9) * 2 + 1
    prepared = calibrate(
        prepare(model, x[:4], recipe(0.5, INT8.keep("first", dtype="bfloat16"))), [x], progress=False
    )
    with torch.no_grad(), floating(prepared):
        found = prepared(x)
    wanted = mixed(model, x, 0.5)(x)
    assert (found - wanted).norm() < 0.02 * wanted.norm()


def test_dead_channels_stay_as_they_are():
    model = trained(nn.Sequential(nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4)))
    with torch.no_grad():
        model[1].weight[1], model[1].running_var[2] = 0.0, 0.0
        model[0].weight[2] = 0.0
    x = torch.randn(20, 2, 5, 5) + 2
    prepared = calibrate(prepare(model, x, recipe(0.3)), [x], progress=False)
    with torch.no_grad(), floating(prepared):
        found = prepared(x)
    assert torch.isfinite(found).all()
    assert torch.allclose(found[:, 1], model(x)[:, 1])


def test_a_shift_of_the_inputs_is_taken_back():
    """A network whose norms saw other inputs: adapted, it answers shifted inputs more as it answers its own."""
    torch.manual_seed(2)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 8, 3),
        nn.BatchNorm2d(8),
        nn.Flatten(),
    )
    own = torch.randn(256, 3, 8, 8)
    assert reestimate_batch_norm(model, own.split(64)) == 2
    model.eval()
    other = 1.5 * own + 0.7
    distances = []
    for steps in (INT8, recipe(0.8)):
        result = pw.quantize(model, list(other.split(64)), steps, progress=False)
        with torch.no_grad():
            distances.append(float((result(other) - model(own)).norm()))
    assert distances[1] < 0.4 * distances[0]


def test_a_norm_called_twice_is_named_and_left():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x):
            return self.norm(self.conv(self.norm(x)))

    model, x = trained(Twice()), torch.randn(8, 3, 4, 4)
    prepared = calibrate(prepare(model, x, recipe(0.5)), [x], progress=False)
    assert [e.site for e in pw.journal(prepared).events if e.kind == "norm not adapted"] == ["norm"]
    with torch.no_grad(), floating(prepared):
        assert torch.equal(prepared(x), model(x))


def test_without_norms_it_says_so():
    prepared = calibrate(
        prepare(nn.Linear(4, 3), torch.randn(9, 4), recipe(0.5)), [torch.randn(9, 4)], progress=False
    )
    assert any("no batch norms" in str(e.data.get("text")) for e in pw.journal(prepared).events)


@pytest.mark.parametrize("share", [0, -0.5, 1.5])
def test_a_share_is_between_0_and_1(share):
    with pytest.raises(RecipeError, match="share"):
        Recipe.parse(recipe(share).to_text())


def test_no_batch_and_no_training():
    model, x = trained(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))), torch.randn(8, 3, 4, 4)
    with pytest.raises(EmptyCalibration):
        calibrate(prepare(model, x, recipe(0.5)), [], progress=False)
    with pytest.raises(RecipeError, match="alive"):
        calibrate(prepare(model, x, recipe(0.5, Recipe.preset("int8-qat"))), [x], progress=False)

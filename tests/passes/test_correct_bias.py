"""Bias correction: mean outputs come back, everything else stays."""

import pytest
import torch
from torch import nn

import pennyweight as pw
from pennyweight.pipeline import calibrate, prepare
from pennyweight.recipe import Recipe

COARSE = """
[[rules]]
weight = "int3n[1,*]"
input = "uint8[*]+z"
optional = true

[[passes]]
pass = "calibrate"
range = "minmax"

[[passes]]
pass = "solve"
"""
CORRECTED = COARSE + '\n[[passes]]\npass = "correct_bias"\n'


def layers():
    gen = torch.Generator().manual_seed(3)
    fill = lambda m: [p.data.normal_(0, 0.3, generator=gen) for p in m.parameters()]  # noqa: E731
    cases = {
        "linear": (nn.Linear(24, 10), torch.rand(64, 24, generator=gen)),
        "linear on sequences": (nn.Linear(24, 10, bias=False), torch.rand(8, 9, 24, generator=gen)),
        "conv1d": (nn.Conv1d(8, 6, 3), torch.rand(16, 8, 20, generator=gen)),
        "depthwise": (nn.Conv2d(12, 12, 3, groups=12, bias=False), torch.rand(16, 12, 9, 9, generator=gen)),
        "groups": (nn.Conv2d(12, 8, 3, groups=4), torch.rand(16, 12, 9, 9, generator=gen)),
        "unbatched": (nn.Conv2d(6, 4, 3), torch.rand(6, 40, 40, generator=gen)),
        "conv3d": (nn.Conv3d(4, 6, 2), torch.rand(8, 4, 6, 6, 6, generator=gen)),
    }
    for layer, x in cases.values():
        fill(layer)
        channels = x.movedim(-1 if isinstance(layer, nn.Linear) else -1 - len(layer.kernel_size), -1)
        channels *= torch.linspace(0.2, 1, channels.shape[-1])  # their means differ
    return cases


def errors(layer, x, recipe):
    """Largest distance of the outputs' means from float's, and the root mean square distance of the outputs."""
    model = calibrate(prepare(layer, x, Recipe.parse(recipe)), [x], progress=False)
    with torch.no_grad():
        axis = -1 if isinstance(layer, nn.Linear) else -1 - len(layer.kernel_size)
        error = (model(x) - layer(x)).movedim(axis, -1).flatten(0, -2)
    return float(error.mean(0).abs().max()), float(error.pow(2).mean().sqrt())


@pytest.mark.parametrize("name", list(layers()))
def test_means_come_back(name):
    layer, x = layers()[name]
    plain_mean, plain = errors(layer, x, COARSE)
    mean, rms = errors(layer, x, CORRECTED)
    assert mean < 0.15 * plain_mean
    assert rms < plain


def test_transposed_convolutions_share_their_taps():
    gen = torch.Generator().manual_seed(5)
    layer = nn.ConvTranspose2d(8, 6, 4, stride=2, padding=1)
    layer.weight.data.normal_(0, 0.3, generator=gen)
    x = torch.rand(4, 8, 24, 24, generator=gen)
    plain_mean, plain = errors(layer, x, COARSE)
    mean, rms = errors(layer, x, CORRECTED)
    assert mean < 0.3 * plain_mean  # the border is not met by every tap
    assert rms < plain


def test_the_formula():
    layer, x = layers()["linear"]
    model = calibrate(prepare(layer, x[:40], Recipe.parse(CORRECTED)), [x[:25], x[25:40]], progress=False)
    q = model.solved["weight"].dequantize()
    torch.testing.assert_close(model.bias_shift, (layer.weight - q) @ x[:40].mean(0), rtol=1e-4, atol=1e-6)
    converted = pw.convert(model)
    scale = converted.x_scale * converted.scale
    wanted = torch.round((layer.bias + model.bias_shift).double() / scale.double())
    assert torch.equal(converted.bias.double(), wanted)


def test_the_float_model_keeps_its_bias():
    layer, x = layers()["depthwise"]
    model = calibrate(prepare(layer, x, Recipe.parse(CORRECTED)), [x], progress=False)
    assert layer.bias is None
    assert model.bias is None
    assert list(model.state_dict()) == [n for n in model.state_dict() if "bias" not in n]
    assert pw.convert(model).bias is not None
    events = [e for e in pw.journal(model).events if e.kind == "bias"]
    assert len(events) == 1
    assert events[0].data["largest"] == pytest.approx(float(model.bias_shift.abs().max()), rel=1e-5)


def test_parts_of_a_concatenation_keep_their_own_means():
    """Their ranges are tied and merged; their channels are not the same."""

    class Joined(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 5, 1), nn.Conv2d(3, 7, 1)
            self.last = nn.Conv2d(12, 4, 1)

        def forward(self, x):
            a, b = self.a(x).relu(), self.b(x).relu()
            return self.last(torch.cat([a, b], 1)) + self.last(torch.cat([a * 2, b], 1))

    torch.manual_seed(0)
    model, x = Joined().eval(), torch.randn(4, 3, 8, 8)
    result = pw.quantize(model, [x], "int8", progress=False)
    with torch.no_grad():
        assert float((result(x) - model(x)).norm() / model(x).norm()) < 0.03


def test_ranged_at_run_time_there_is_nothing_to_correct():
    torch.manual_seed(0)
    result = pw.quantize(nn.Linear(16, 8), [torch.rand(4, 16)], "int8-dynamic", progress=False)
    assert not [e for e in pw.journal(result).events if e.kind == "bias"]


def test_files_hold_the_corrected_bias(tmp_path):
    layer, x = layers()["depthwise"]
    model = nn.Sequential(layer)
    result = pw.quantize(model, [x], "int8", progress=False)
    pw.save(result, tmp_path / "m.safetensors")
    again = pw.load(tmp_path / "m.safetensors", model, x)
    with torch.no_grad():
        assert torch.equal(result(x), again(x))


class Chain(nn.Module):
    """Three layers whose errors add up."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Linear(8, 5)

    def forward(self, x):
        return self.c(self.b(self.a(x).relu()).relu().mean((2, 3)))


def test_measured_means_are_those_of_float():
    """Layer by layer, behind what was corrected before; the last one's are the network's."""
    model = Chain().eval()
    x = torch.rand(64, 3, 9, 9)
    drift = {}
    for source in ("", "data", "outputs"):
        text = COARSE + (f'\n[[passes]]\npass = "correct_bias"\nsource = "{source}"\n' if source else "")
        prepared = calibrate(prepare(model, x, Recipe.parse(text)), [x[:32], x[32:]], progress=False)
        with torch.no_grad():
            drift[source] = float((prepared(x) - model(x)).mean(0).abs().max())
    assert drift["outputs"] < 1e-5
    assert drift["outputs"] < drift["data"] < drift[""]
    assert len(pw.journal(prepared).of("bias")) == 3


def test_sums_beside_measured_layers_stay_theirs():
    """What a hook computes while the model runs is no site of the model: a residual sum right behind a layer."""

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b, self.c = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))

        def forward(self, x):
            y = self.a(x).relu()
            return self.c(y + self.b(y)).mean((2, 3))

    model, x = Residual().eval(), torch.rand(96, 4, 9, 9)
    text = COARSE + '\n[[passes]]\npass = "correct_bias"\nsource = "outputs"\n'
    prepared = calibrate(prepare(model, x, Recipe.parse(text)), list(x.split(32)), progress=False)
    with torch.no_grad():
        assert float((prepared(x) - model(x)).mean(0).abs().max()) < 1e-5


@pytest.mark.parametrize("source", ["data", "outputs"])
def test_biases_that_are_shifted_already_can_be_kept(source):
    """Behind retargeting the transposed convolution alone, which cannot be retargeted, has its bias corrected."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.ConvTranspose2d(6, 4, 2, 2), nn.ReLU(), nn.Conv2d(4, 5, 1)
    )
    x = torch.rand(48, 3, 9, 9)
    aimed = COARSE + 'solver = "gptq"\nretarget = true\n'
    corrected = f'{aimed}\n[[passes]]\npass = "correct_bias"\nsource = "{source}"\nkeep = true\n'
    before, after = (
        calibrate(prepare(model, x, Recipe.parse(text)), [x], progress=False) for text in (aimed, corrected)
    )
    for name in ("0", "4"):
        kept = before.get_submodule(name).bias_shift
        assert kept is not None and torch.equal(kept, after.get_submodule(name).bias_shift)
    assert before.get_submodule("2").bias_shift is None
    assert after.get_submodule("2").bias_shift is not None
    assert len(pw.journal(after).of("bias")) == 3

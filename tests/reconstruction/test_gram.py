"""Unfolded inputs give the layer's own outputs, and the solvers that read them find better weights."""

import pytest
import torch
from torch import nn

import pennyweight as pw
from pennyweight.nn.conv import conv_matrix
from pennyweight.pipeline import calibrate, prepare
from pennyweight.ranges import ranges
from pennyweight.recipe import Recipe
from pennyweight.reconstruction import gram
from pennyweight.reconstruction.capture import floating, mean_outputs
from pennyweight.reconstruction.gram import expected_gram, has_rows, input_gram, pieces
from pennyweight.reconstruction.normals import Channels
from pennyweight.reconstruction.paired import PULLS, paired, seen_inputs, steady_pull
from pennyweight.solvers.gptq import gptq
from pennyweight.spec import QuantSpec

LOW = """
[[rules]]
weight = "int3n[1,*]"
input = "uint8[*]+z"
optional = true

[[passes]]
pass = "fold_batch_norm"

[[passes]]
pass = "calibrate"

[[passes]]
pass = "solve"
"""
GPTQ = LOW + 'solver = "gptq"\nsolver_options = { damp = 0.02 }\n'

LAYERS = {
    "linear": (nn.Linear(6, 5), (4, 3, 6)),
    "conv1d": (nn.Conv1d(4, 6, 3, padding=1, stride=2), (2, 4, 9)),
    "conv2d": (nn.Conv2d(4, 6, (3, 2), padding=(1, 0), stride=(2, 1), dilation=(1, 2)), (2, 4, 9, 7)),
    "groups": (nn.Conv2d(4, 6, 3, groups=2), (2, 4, 6, 6)),
    "depthwise": (nn.Conv2d(4, 8, 3, groups=4, padding="same", padding_mode="reflect"), (2, 4, 6, 6)),
    "conv3d": (nn.Conv3d(2, 3, 2), (2, 2, 4, 4, 4)),
    "unbatched": (nn.Conv2d(4, 6, 3), (4, 6, 6)),
}


def rows(twin, x):
    """All pieces, [groups, n, in]."""
    return torch.cat(list(pieces(twin, x)[1]), 1)


@pytest.mark.parametrize("name", list(LAYERS))
def test_rows_times_the_matrix_are_the_outputs(name):
    layer, shape = LAYERS[name]
    torch.manual_seed(0)
    x = torch.randn(shape)
    twin = prepare(layer, x, Recipe.parse(LOW))
    assert has_rows(twin)
    matrix = layer.weight if isinstance(layer, nn.Linear) else conv_matrix(layer.weight, False, layer.groups)
    found = rows(twin, x)
    parts = matrix.reshape(len(found), -1, matrix.shape[1])
    y = (found @ parts.mT + layer.bias.reshape(len(found), 1, -1)).movedim(0, 1).flatten(1)  # [n, out]
    wanted = layer(x)
    channels = -1 if isinstance(layer, nn.Linear) else -1 - len(layer.kernel_size)
    torch.testing.assert_close(y, wanted.movedim(channels, -1).reshape(-1, wanted.shape[channels]))


@pytest.mark.parametrize("name", list(LAYERS))
def test_pieces_are_the_rows(name, monkeypatch):
    layer, shape = LAYERS[name]
    torch.manual_seed(0)
    x = torch.randn(3, *shape[1:]) if name != "unbatched" else torch.randn(shape)
    twin = prepare(layer, x, Recipe.parse(LOW))
    whole = rows(twin, x)
    for piece, least in ((1, 0), (100, 0), (1, 1), (1 << 21, 4)):
        monkeypatch.setattr(gram, "PIECE", piece)
        monkeypatch.setattr(gram, "LEAST", least)
        count, parts = pieces(twin, x)
        found = list(parts)
        assert torch.equal(torch.cat(found, 1), whole)
        assert count == sum(part.shape[1] for part in found)
        if (piece, least) == (1, 0):  # as small as they get: one vector, or one image
            assert len(found) == {"linear": 9, "unbatched": 1}.get(name, 3)


def test_transposed_convolutions_have_none(cnn):
    assert not has_rows(prepare(nn.ConvTranspose2d(4, 4, 3), torch.randn(1, 4, 5, 5), Recipe.parse(LOW)))


def test_the_gram_is_of_rounded_inputs():
    torch.manual_seed(0)
    x = torch.randn(50, 6)
    twin = calibrate(prepare(nn.Linear(6, 5), x, Recipe.parse(LOW)), [x], progress=False)
    gram = input_gram(twin, [x[:20], x[20:]], twin)
    y = twin.input(x)
    torch.testing.assert_close(gram, (y.T @ y / 50).double().unsqueeze(0), rtol=1e-5, atol=1e-6)
    assert not torch.equal(y, x)


def drift(model, x, recipe):
    result = pw.quantize(model, [x[: len(x) // 2], x[len(x) // 2 :]], Recipe.parse(recipe), progress=False)
    with torch.no_grad():
        return float((result(x) - model(x)).norm() / model(x).norm())


def test_networks_come_closer(cnn):
    torch.manual_seed(0)
    x = torch.randn(64, 3, 8, 8)
    assert drift(cnn, x, GPTQ) < 0.85 * drift(cnn, x, LOW)


@pytest.mark.parametrize("piece", [1, gram.PIECE])
@pytest.mark.parametrize("name", ["linear", "conv2d", "groups", "depthwise"])
def test_two_streams_are_compared(name, piece, monkeypatch):
    """The moments of rounded inputs and others, and the shift that keeps the mean of the results."""
    layer, shape = LAYERS[name]
    monkeypatch.setattr(gram, "PIECE", piece)
    monkeypatch.setattr(gram, "LEAST", 0)
    torch.manual_seed(0)
    batches = [torch.randn(3, *shape[1:]) + 0.5, torch.randn(5, *shape[1:])]
    twin = calibrate(prepare(layer, batches[0], Recipe.parse(LOW)), batches, progress=False)
    others = [x + 0.1 * torch.randn_like(x) for x in batches]
    assert all(torch.equal(a, b) for a, b in zip(seen_inputs(twin, others, twin), others, strict=True))
    halves = paired(twin, batches, twin, others)
    met = halves[0] + halves[1]
    assert abs(halves[0].count - halves[1].count) <= len(batches)
    x, y = (
        torch.cat([rows(twin, v) for v in part], 1).double() for part in (map(twin.input, batches), others)
    )
    assert met.count == x.shape[1]
    for group in range(len(x)):
        both = torch.cov(torch.cat([x[group], y[group]], 1).T, correction=0)
        size = x.shape[2]
        torch.testing.assert_close(met.gram[group], both[:size, :size], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(met.cross[group], both[size:, :size], rtol=1e-4, atol=1e-5)
    rounded = twin.solved["weight"].dequantize()
    weight = layer.weight.detach().reshape(rounded.shape)
    parts = [w.double().reshape(len(x), -1, x.shape[2]) for w in (weight, rounded)]
    wanted = (y @ parts[0].mT).mean(1) - (x @ parts[1].mT).mean(1)
    torch.testing.assert_close(met.shift(weight, rounded), wanted.flatten().float(), rtol=1e-4, atol=1e-5)


def test_the_pull_is_what_holds_elsewhere():
    """Errors of inputs that follow from them call for little pull, errors that do not for much."""
    torch.manual_seed(0)
    layer = nn.Linear(24, 8)
    weight = layer.weight.detach()
    twin = prepare(layer, torch.randn(2, 24), Recipe.parse(LOW))
    mixed = torch.eye(24) + 0.1 * torch.randn(24, 24)
    few, many = torch.randn(40, 24), torch.randn(4000, 24)
    found = [
        steady_pull(weight, paired(twin, [x], twin, [y]))
        for x, y in ((many, many @ mixed), (few, few + 0.3 * torch.randn_like(few)))
    ]
    assert found[0] == PULLS[0]
    assert found[1] >= 1
    x, y = many, many @ mixed
    half = paired(twin, [x], twin, [y])[0]
    apart = [
        (y[:2000] @ weight.T - x[:2000] @ w.T).var(0, correction=0).sum() for w in (weight, 0.9 * weight)
    ]
    same, less = half.errors(weight, [weight, 0.9 * weight])
    wanted = same - less
    torch.testing.assert_close(float(apart[0] - apart[1]), wanted, rtol=1e-3, atol=1e-4)


def test_inputs_that_hardly_differ_have_no_negative_variance():
    """A mean a thousand times the deviations, along one direction: the covariance stays one."""
    torch.manual_seed(0)
    layer = nn.Linear(32, 8)
    twin = prepare(layer, torch.randn(2, 32), Recipe.parse(LOW))
    x = 100 * torch.rand(1, 32) + 0.1 * torch.randn(60, 1) * torch.randn(1, 32)
    batches = [x, x + 1e-4 * torch.randn(60, 32)]
    halves = paired(twin, batches, twin, batches)
    for half in (*halves, halves[0] + halves[1]):
        values = torch.linalg.eigvalsh(half.gram)
        assert float(values.min()) > -1e-6 * float(values.max())
    assert steady_pull(layer.weight.detach(), halves) in PULLS


def test_retargeted_layers_answer_as_in_float(cnn):
    """Nearer to the float network than without, and with its mean result at every layer."""
    torch.manual_seed(0)
    x = torch.randn(64, 3, 8, 8)
    aimed = GPTQ + "retarget = true\n"
    assert drift(cnn, x, aimed) < 0.8 * drift(cnn, x, GPTQ)
    prepared = prepare(cnn, x, Recipe.parse(aimed))
    calibrate(prepared, [x[:32], x[32:]], progress=False)
    layers = {n: m for n, m in prepared.named_modules() if getattr(m, "solved", None)}
    assert len(layers) > 1
    with floating(prepared):
        wanted = mean_outputs(prepared, [x], layers)
    found = mean_outputs(prepared, [x], layers)
    for name, mean in wanted.items():
        torch.testing.assert_close(found[name], mean, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize(
    "options", ['solver = "rtn"', 'solver = "gptq"\ninputs = "norms"', 'solver = "gptq"\npull = -0.1']
)
def test_retargeting_reads_inputs(options):
    recipe = f'[[rules]]\nweight = "int4[1,*]"\n[[passes]]\npass = "solve"\nretarget = true\n{options}\n'
    with pytest.raises(pw.errors.RecipeError, match=r"retarget|pull"):
        pw.quantize(nn.Linear(4, 4), [torch.randn(2, 4)], Recipe.parse(recipe), progress=False)


def test_generators_are_held():
    """Batches that can be read once are read again by the solver."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    x = torch.randn(64, 16)
    once = pw.quantize(model, (b for b in x.split(16)), Recipe.parse(GPTQ), progress=False)
    again = pw.quantize(model, lambda: iter(x.split(16)), Recipe.parse(GPTQ), progress=False)
    assert torch.equal(once(x), again(x))


def test_without_inputs_there_is_nothing_to_solve():
    recipe = 'name = "w"\n[[rules]]\nweight = "int4[1,*]"\n[[passes]]\npass = "solve"\nsolver = "gptq"\n'
    with pytest.raises(pw.errors.EmptyCalibration, match="gptq"):
        pw.quantize(nn.Linear(4, 4), None, Recipe.parse(recipe), example=torch.randn(2, 4), progress=False)


def test_moments_without_data():
    """Against samples: independent channels, places of a kernel that are alike by half."""
    torch.manual_seed(0)
    twin = prepare(nn.Conv2d(4, 6, (1, 2), groups=2), torch.randn(1, 4, 3, 3), Recipe.parse(LOW))
    mean, deviation = torch.tensor([1.0, -2.0, 0.0, 0.5]), torch.tensor([1.0, 0.5, 2.0, 1.0])
    shared, own = torch.randn(20_000, 4, 1, 1), torch.randn(20_000, 4, 1, 2)
    x = mean.view(4, 1, 1) + deviation.view(4, 1, 1) * (shared + own) / 2**0.5
    found = expected_gram(twin, Channels.normal(mean.double(), deviation.double()), 0.5)
    vectors = rows(twin, x).double()
    torch.testing.assert_close(found, vectors.mT @ vectors / vectors.shape[1], rtol=0.05, atol=0.05)


def test_vanishing_inputs_do_no_harm():
    """Channels of almost no size: a factor on the moments changes nothing."""
    weight, spec = torch.randn(8, 9), QuantSpec.parse("int4[1,*]")
    x = torch.randn(100, 9)
    gram = (x.T @ x / 100).double().expand(4, 9, 9)
    tiny = gptq(weight, spec, ranges["minmax"](), gram * 1e-40)
    assert torch.equal(tiny.codes, gptq(weight, spec, ranges["minmax"](), gram).codes)

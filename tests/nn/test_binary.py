"""Layers whose weights and inputs are signs: from rules to programs, and to the engine on every instruction set."""

import numpy as np
import pytest
import torch
from torch import nn

import pennyweight as pw
from pennyweight.errors import UnrealisableSite
from pennyweight.nn.integer import pack_signs, unpack_signs
from pennyweight.recipe import Recipe
from pennyweight.runtime import library
from pennyweight.runtime.engine import Engine

TEXT = """
{rules}

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


def recipe(*layers):
    """Signs in these layers, int8 in the rest."""
    rule = '[[rules]]\nmatch = "{}"\nweight = "binary[1,*]"\ninput = "binary[*]"\n'
    return Recipe.parse(TEXT.format(rules="\n".join(rule.format(name) for name in layers)))


def converted(model, batches, *layers):
    prepared = pw.calibrate(pw.prepare(model, batches[0], recipe(*layers)), batches, progress=False)
    return prepared, pw.convert(prepared)


def same_everywhere(program, x):
    """The program's results, which every instruction set gives too, on one thread and two."""
    inputs = {next(iter(program.inputs)): x.numpy()}
    want = pw.interpret(program, inputs)
    for isa in library.supported_isas():
        for threads in (1, 2):
            got = Engine(program, threads=threads, isa=isa).run(inputs)
            for name, value in want.items():
                assert np.array_equal(got[name], value), (isa, threads)
    return next(iter(want.values()))


CASES = {
    "conv": (nn.Conv2d(32, 24, 3, padding=1), (2, 32, 7, 9)),
    "strided": (nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False), (2, 16, 9, 8)),
    "pointwise": (nn.Conv2d(17, 9, 1), (2, 17, 5, 6)),
    "groups": (nn.Conv2d(12, 18, 3, groups=3, padding=(0, 2)), (2, 12, 7, 9)),
    "dilated": (nn.Conv2d(4, 6, 3, dilation=2, padding="same"), (2, 4, 9, 9)),
    "reflect": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (2, 4, 9, 9)),
    "1d": (nn.Conv1d(5, 7, 3, padding=1), (3, 5, 17)),
    "3d": (nn.Conv3d(3, 5, (2, 3, 3), padding=(0, 1, 1)), (2, 3, 4, 7, 6)),
    "linear": (nn.Linear(70, 40), (3, 5, 70)),
    "linear without bias": (nn.Linear(128, 33, bias=False), (4, 128)),
}


@pytest.mark.parametrize("name", CASES)
def test_module_model_and_program(name):
    torch.manual_seed(0)
    layer, shape = CASES[name]
    batches = [torch.randn(shape) for _ in range(2)]
    batches[1].flatten()[:3] = torch.tensor([0.0, -0.0, 1.0])
    prepared, integer = converted(nn.Sequential(layer), batches, "0")
    assert integer[0].mode == "binary"
    assert integer[0].codes.shape == (len(layer.weight), -(-layer.weight[0].numel() // 8))
    with torch.no_grad():
        fake, got = prepared(batches[1]), integer(batches[1])
    torch.testing.assert_close(got, fake, rtol=1e-5, atol=1e-4)
    # from first principles: +-1 times +-1, zeros around
    binary = type(layer)(**{
        k: getattr(layer, k) for k in ("in_channels", "out_channels", "kernel_size", "stride", "padding",
                                       "dilation", "groups", "padding_mode", "in_features", "out_features")
        if hasattr(layer, k)
    })  # fmt: skip
    scale = layer.weight.detach().flatten(1).abs().amax(1).reshape(-1, *[1] * (layer.weight.ndim - 1))
    binary.weight.data = torch.where(layer.weight >= 0, scale, -scale)
    binary.bias.data = torch.zeros(len(scale)) if layer.bias is None else layer.bias.detach()
    with torch.no_grad():
        want = binary(torch.where(batches[1] >= 0, 1.0, -1.0))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)
    program = pw.lower(integer, batches[0])
    np.testing.assert_array_equal(same_everywhere(program, batches[1]), got.numpy())


class Block(nn.Module):
    """As in Bi-Real nets: the sign, a convolution, its norm, and the input added."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x):
        return self.norm(self.conv(x)) + x


def network(middle):
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), *middle, nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(16, 5),
    )  # fmt: skip
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.normal_(m.weight)  # of both signs
            nn.init.normal_(m.bias)
            m.running_var.uniform_(20, 60)
            m.running_mean.normal_(0, 3)
    return model.eval()


def test_mixed_network_is_one_program(tmp_path):
    """First and last layer in int8, signs between: one file, the same bits everywhere."""
    model = network([Block(16), Block(16)])
    batches = [torch.randn(2, 3, 10, 10) for _ in range(2)]
    prepared, integer = converted(model, batches, "2.conv", "3.conv")
    program = pw.lower(integer, batches[0])
    kinds = [op.kind for op in program.ops]
    assert kinds.count("conv_binary") == 2
    assert kinds.count("conv") == 1
    assert kinds.count("sign") == 2
    with torch.no_grad():
        want = integer(batches[1]).numpy()
        torch.testing.assert_close(integer(batches[1]), prepared(batches[1]), rtol=0.05, atol=0.1)
    got = same_everywhere(program, batches[1])
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=0.1)
    path = tmp_path / "mixed.dwt"
    pw.save(program, path)
    back = pw.load(path)
    np.testing.assert_array_equal(np.asarray(back(batches[1].numpy())).reshape(got.shape), got)


def test_norm_and_sign_become_a_threshold():
    """Nothing in floats stands between two layers of signs, and no bit differs from the program that has it."""
    middle = [
        nn.Conv2d(16, 24, 3, padding=1),
        nn.BatchNorm2d(24),
        nn.Hardtanh(),
        nn.Conv2d(24, 16, 3, padding=1),
    ]
    model = network(middle)
    batches = [torch.randn(2, 3, 8, 8) for _ in range(2)]
    _, integer = converted(model, batches, "2", "5")
    program = pw.lower(integer, batches[0])
    second = [op for op in program.ops if op.kind == "sign"][1]
    assert program.ops[[op.outputs[0] for op in program.ops].index(second.inputs[0])].kind == "conv_binary"
    with torch.no_grad():
        want = integer(batches[1]).numpy()
    np.testing.assert_allclose(same_everywhere(program, batches[1]), want, rtol=1e-4, atol=1e-3)


def test_packing_round_trips():
    positive = torch.randint(0, 2, (5, 21)) > 0
    packed = pack_signs(positive)
    assert packed.shape == (5, 3)
    assert int(packed[0, 0] & 1) == int(positive[0, 0])
    assert torch.equal(unpack_signs(packed, 21), positive.float() * 2 - 1)


def test_transposed_convolutions_are_refused():
    model, batch = nn.Sequential(nn.ConvTranspose2d(4, 4, 3)), torch.randn(1, 4, 5, 5)
    with pytest.raises(UnrealisableSite, match="transposed"):
        converted(model, [batch], "0")

"""Batch normalisation that stands before its convolution: codes in, codes out."""

import numpy as np
import pytest
import torch
from torch import nn

from pennyweight.nn.norm import IntegerBatchNorm
from pennyweight.passes.solve import sqnr
from pennyweight.pipeline import prepare, quantize, state
from pennyweight.program.interpret import interpret
from pennyweight.program.lower import lower


class Dense(nn.Module):
    """A dense block: norm, relu, convolution, joined to what came before."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm1, self.conv1 = nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3, padding=1)
        self.norm2, self.conv2 = nn.BatchNorm2d(12), nn.Conv2d(12, 4, 3, padding=1)
        self.norm3, self.fc = nn.BatchNorm2d(16), nn.Linear(16, 5)

    def forward(self, x):
        x = self.first(x)
        x = torch.cat([x, self.conv1(self.norm1(x).relu())], 1)
        x = torch.cat([x, self.conv2(self.norm2(x).relu())], 1)
        return self.fc(self.norm3(x).relu().mean((2, 3)))


class PreActivation(nn.Module):
    """A residual block with norms in front, and a norm that does not clip."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm1, self.conv1 = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1)
        self.norm2, self.conv2 = nn.BatchNorm2d(8, affine=False), nn.Conv2d(8, 8, 1)
        self.norm3, self.fc = nn.BatchNorm2d(8), nn.Linear(8, 5)

    def forward(self, x):
        x = self.first(x)
        y = self.conv1(self.norm1(x).relu())
        x = x + self.conv2(self.norm2(torch.cat([y, y], 1)[:, :8]))
        return self.fc(self.norm3(x).relu().mean((2, 3)))


class Flat(nn.Module):
    """A norm of features, straight on the input."""

    def __init__(self, width=6):
        super().__init__()
        self.norm, self.fc, self.out = nn.BatchNorm1d(width), nn.Linear(width, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.out(self.fc(self.norm(x)).relu())


class Volume(nn.Module):
    """A norm in three dimensions."""

    def __init__(self):
        super().__init__()
        self.norm, self.conv, self.conv2 = nn.BatchNorm3d(2), nn.Conv3d(2, 4, 3), nn.Conv3d(4, 3, 1)

    def forward(self, x):
        return self.conv2(self.conv(self.norm(x)).relu())


CASES = [
    (Dense, (6, 3, 8, 8), 3),
    (PreActivation, (6, 3, 8, 8), 3),
    (Flat, (32, 6), 1),
    (Volume, (4, 2, 4, 4, 4), 1),
]


def trained(make, shape):
    model = make().train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.5)
    for _ in range(8):
        model(torch.randn(shape) * 2 + 1)
    return model.eval()


@pytest.mark.parametrize(("make", "shape", "norms"), CASES)
def test_codes_to_codes(make, shape, norms):
    model, x = trained(make, shape), torch.randn(shape) * 2 + 1
    quantized = quantize(model, [x, torch.randn(shape) * 2 + 1], "int8", progress=False)
    assert sum(isinstance(m, IntegerBatchNorm) for m in quantized.modules()) == norms
    assert sqnr(model(x), quantized(x)) > 30
    program = lower(quantized, x)
    kinds = [op.kind for op in program.ops]
    assert kinds.count("affine_q") == norms
    assert "binary" not in kinds
    assert "unary" not in kinds
    for rows in (1, shape[0] + 2):
        y = torch.randn(rows, *shape[1:]) * 2 + 1
        got = interpret(program, {n: y.numpy() for n in program.inputs})[program.outputs[0]]
        # one multiplier instead of two roundings: a code of the norm's result may fall on the other side of a tie
        assert sqnr(quantized(y), torch.from_numpy(got)) > 40
    assert not state(quantized).plan.kept


def test_twin_shares_and_computes_as_the_float_norm():
    model, x = trained(Flat, (32, 6)), torch.randn(8, 6)
    prepared = prepare(model, x, "int8")
    assert isinstance(prepared.norm, nn.BatchNorm1d)
    assert prepared.norm.weight is model.norm.weight
    assert torch.equal(prepared(x), model(x))
    assert list(prepared.norm.state_dict())[:5] == list(model.norm.state_dict())


def test_converted_norm_is_the_formula():
    model, x = trained(Flat, (32, 6)), torch.randn(32, 6)
    norm = quantize(model, [x], "int8", progress=False).norm
    rounded = torch.ops.pennyweight.round_to_codes(x, norm.x_scale, norm.x_zero)
    assert torch.allclose(norm(x), model.norm(rounded), atol=1e-6)
    assert norm.gain.dtype == norm.shift.dtype == torch.float32
    assert np.abs((x - rounded).numpy()).max() <= float(norm.x_scale) / 2 + 1e-6


def test_norm_by_the_statistics_of_the_batch_stays():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.fc = nn.BatchNorm1d(6, track_running_stats=False), nn.Linear(6, 3)

        def forward(self, x):
            return self.fc(self.norm(x))

    model, x = Model().eval(), torch.randn(16, 6)
    quantized = quantize(model, [x], "int8", progress=False)
    assert type(quantized.norm) is nn.BatchNorm1d
    assert sqnr(model(x), quantized(x)) > 30

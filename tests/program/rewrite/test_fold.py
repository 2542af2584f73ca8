"""Constants behind a float product go into its weights and bias."""

from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn

from pennyweight.program.interpret import interpret
from pennyweight.program.lower import lower


@pytest.fixture(autouse=True)
def _inference():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def checked(model, *shape):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            for t in (module.weight, module.bias, module.running_mean):
                t.normal_()
            module.running_var.uniform_(0.5, 2)
    x = torch.randn(shape)
    program = lower(model.eval(), x)
    got = interpret(program, dict.fromkeys(program.inputs, x.numpy()))[program.outputs[0]]
    np.testing.assert_allclose(got, model(x).numpy(), atol=1e-5, rtol=1e-5)
    return Counter(op.kind for op in program.ops)


def test_batch_norms_vanish():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8),
        nn.Flatten(), nn.Linear(72, 5), nn.BatchNorm1d(5),
    )  # fmt: skip
    kinds = checked(model, 2, 3, 7, 7)
    assert kinds["binary"] == 0 and kinds["conv_f32"] == 2 and kinds["linear_f32"] == 1


def test_a_product_that_others_read_stays():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x):
            y = self.conv(x)
            return self.norm(y) + y

    assert checked(Both(), 1, 3, 4, 4)["binary"] == 3


def test_constants_along_other_axes_stay():
    class Rows(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 4)
            self.places = nn.Parameter(torch.randn(4, 1))
            self.whole = nn.Parameter(torch.randn(4, 4))

        def forward(self, x):
            return (self.fc(x) + self.places) * self.whole

    assert checked(Rows(), 2, 4, 6)["binary"] == 2


def test_shared_weights_are_scaled_apart():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.first, self.second = nn.Linear(6, 6), nn.BatchNorm1d(6), nn.BatchNorm1d(6)

        def forward(self, x):
            return self.second(self.fc(self.first(self.fc(x))))

    assert checked(Twice(), 4, 6)["binary"] == 0

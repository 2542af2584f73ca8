"""Signs in training: values, scales, and gradients by their equations."""

import pytest
import torch

from pennyweight.gradients import estimators
from pennyweight.gradients.signs import Signs, slope_of
from pennyweight.qtensor import QParams
from pennyweight.spec import QuantSpec

BINARY = QuantSpec.parse("binary[1,*]")


def test_values_are_scaled_signs_and_gradients_are_not_scaled():
    x = torch.tensor([[0.0, -0.0, 0.5, -2.0], [3.0, -0.1, 0.2, 0.9]], requires_grad=True)
    estimator = estimators["signs"]
    params = estimator.first(x, BINARY)
    assert torch.allclose(params.scale.flatten(), x.detach().abs().mean(1))
    y = estimator.round(x, {"scale": params.scale, "zero": torch.zeros(2)}, BINARY, 4)
    signs = torch.tensor([[1.0, 1, 1, -1], [1, -1, 1, 1]])
    assert torch.allclose(y.detach(), signs * params.scale.reshape(2, 1))
    y.sum().backward()
    assert torch.equal(x.grad, (x.detach().abs() <= 1).float())


@pytest.mark.parametrize("slope", ["clipped", "approx", "ede", "swish"])
def test_slopes_follow_their_equations(slope):
    x = torch.linspace(-3, 3, 61, dtype=torch.float64)
    progress, beta = 0.8, 5.0
    # each slope is the derivative of a known function
    t = 10 ** (3 * progress - 2)
    functions = {
        "clipped": lambda v: v.clamp(-1, 1),
        "approx": lambda v: (2 * v - v * v.abs()).where(v.abs() < 1, v.sign()),
        "ede": lambda v: max(1 / t, 1) * torch.tanh(t * v),
        "swish": lambda v: 2 * torch.sigmoid(beta * v) * (1 + beta * v * (1 - torch.sigmoid(beta * v))) - 1,
    }
    points = x[(x.abs() - 1).abs() > 0.01].requires_grad_()
    functions[slope](points).sum().backward()
    torch.testing.assert_close(
        slope_of(points.detach(), slope, progress, beta), points.grad, rtol=1e-5, atol=1e-6
    )


def test_other_grids_train_as_under_lsq():
    spec, x = QuantSpec.parse("int4[1,*]"), torch.randn(3, 8)
    held = {"scale": torch.full((3, 1), 0.2), "zero": torch.zeros(3, 1)}
    assert torch.equal(Signs().round(x, held, spec, 8), estimators["lsq"].round(x, held, spec, 8))
    assert "scale" in Signs().start(QParams(torch.ones(3, 1)), spec)
    assert Signs().start(QParams(torch.ones(3, 1)), BINARY) == {}

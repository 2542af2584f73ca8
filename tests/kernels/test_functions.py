"""The torch functions give the bits of the interpreter's."""

import numpy as np
import pytest
import torch

from pennyweight.kernels import functions
from pennyweight.program.ops import functions as law
from pennyweight.program.ops import normalize


def bits(x):
    return np.asarray(x, np.float32).view(np.int32)


VALUES = torch.cat(
    [
        torch.linspace(-110, 110, 30011),
        torch.randn(20000, generator=torch.Generator().manual_seed(0)) * 3,
        torch.tensor([0.0, -0.0, 1e-30, -1e-30, 87.0, -87.0, 88.0, 89.0, float("inf"), -float("inf")]),
    ]
)


@pytest.mark.parametrize("name", ["exp", "sigmoid", "tanh"])
def test_same_bits(name):
    with np.errstate(all="ignore"):
        want = getattr(law, name)(VALUES.numpy())
    assert np.array_equal(bits(getattr(functions, name)(VALUES)), bits(want))


@pytest.mark.parametrize("name", ["exp", "sigmoid", "tanh"])
def test_nan_follows_the_law(name):
    x = torch.tensor([float("nan")])
    with np.errstate(all="ignore"):
        want = getattr(law, name)(x.numpy())
    assert np.array_equal(getattr(functions, name)(x).numpy(), want, equal_nan=True)


@pytest.mark.parametrize("name", ["exp", "sigmoid", "tanh"])
def test_close_to_torch(name):
    x = VALUES[VALUES.abs() < 80]
    want = getattr(torch, name)(x.double())
    assert torch.allclose(getattr(functions, name)(x).double(), want, rtol=5e-7, atol=2e-7)


@pytest.mark.parametrize("n", [0, 1, 15, 16, 17, 64, 131])
def test_softmax_and_lane_sum_same_bits(n):
    x = torch.randn(3, 5, n, generator=torch.Generator().manual_seed(n)) * 4
    assert np.array_equal(bits(functions.lane_sum(x)), bits(normalize.lane_sum(x.numpy())))
    assert np.array_equal(bits(functions.softmax(x)), bits(normalize.softmax_last(x.numpy())))


def test_softmax_of_masked_rows():
    x = torch.tensor([[0.0, -float("inf"), 1.0], [-float("inf")] * 3])
    with np.errstate(invalid="ignore"):
        want = normalize.softmax_last(x.numpy())
    got = functions.softmax(x)
    assert np.array_equal(bits(got), bits(want))
    assert got[0, 1] == 0
    assert torch.equal(got[1], torch.full((3,), 1 / 3))

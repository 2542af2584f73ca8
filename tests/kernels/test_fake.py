"""Rounding in training: the plain form lays its results out as the declared shapes say, which compiled graphs rely on."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pennyweight.kernels import native


@pytest.mark.parametrize("kind", ["native", "reference"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_strides_are_those_declared(kind, layout, monkeypatch):
    monkeypatch.setattr(native, "backend", lambda: kind)
    ops = torch.ops.pennyweight
    x = torch.randn(2, 3, 4, 5).to(memory_format=layout)
    scale, bounds = torch.tensor([0.1]), (-128.0, 127.0)
    y = ops.fake_quantize(x, scale, None, *bounds, 0.0, 1.0, 0)
    dx, sums = ops.fake_gradient(x, torch.ones_like(x), scale, None, *bounds, 0.0)
    with FakeTensorMode() as mode:
        a, s = mode.from_tensor(x), mode.from_tensor(scale)
        declared = ops.fake_quantize(a, s, None, *bounds, 0.0, 1.0, 0)
        grad, three = ops.fake_gradient(a, a, s, None, *bounds, 0.0)
    assert y.stride() == declared.stride() == x.stride()
    assert dx.stride() == grad.stride()
    assert sums.shape == three.shape
    assert torch.equal(y, torch.round(x * (1.0 / scale)).clamp(*bounds) * scale)

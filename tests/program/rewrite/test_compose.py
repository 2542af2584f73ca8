"""RMS norms and rotary embeddings written out in elementary ops become one op each, with the same bits."""

import numpy as np
import pytest
import torch
from torch import nn

from pennyweight.program.interpret import interpret
from pennyweight.program.lower import lower
from pennyweight.program.rewrite.compose import compose


class Norm(nn.Module):
    def __init__(self, gain=True):
        super().__init__()
        self.gain = nn.Parameter(torch.linspace(0.5, 2, 24)) if gain else None

    def forward(self, x):
        y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
        return y if self.gain is None else self.gain * y


class Turn(nn.Module):
    """As in transformers: heads in front of tokens, cos and sin from positions."""

    def __init__(self, swapped=False):
        super().__init__()
        self.swapped = swapped
        self.register_buffer("steps", torch.linspace(1, 0.01, 4))

    def forward(self, x):
        x = x.view(1, x.shape[1], 3, 8).transpose(1, 2)
        angles = torch.arange(x.shape[2])[:, None].float() * self.steps
        angles = torch.cat([angles, angles], -1)[None, None]
        low, high = x[..., :4], x[..., 4:]
        halves = torch.cat([high, -low] if self.swapped else [-high, low], -1)
        return x * angles.cos() + halves * angles.sin()


def both(model, monkeypatch):
    x = torch.randn(1, 5, 24, generator=torch.Generator().manual_seed(0))
    composed = lower(model, (x,), dynamic={"x": (1,)})
    monkeypatch.setattr("pennyweight.program.rewrite.compose", lambda program: program)
    plain = lower(model, (x,), dynamic={"x": (1,)})
    longer = {"x": np.random.default_rng(0).standard_normal((1, 9, 24)).astype(np.float32)}
    (a,), (b,) = interpret(composed, longer).values(), interpret(plain, longer).values()
    np.testing.assert_array_equal(a, b)
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(a), model(torch.from_numpy(longer["x"])))
    return [op.kind for op in composed.ops], [op.kind for op in plain.ops]


@pytest.mark.parametrize("gain", [True, False])
def test_rms_norm(gain, monkeypatch):
    composed, plain = both(Norm(gain), monkeypatch)
    assert composed == ["rms_norm"]
    assert "rms_norm" not in plain


def test_rotary(monkeypatch):
    composed, plain = both(Turn(), monkeypatch)
    assert composed.count("rotary") == 1
    assert "rotary" not in plain
    assert len(composed) < len(plain)


def test_what_turns_the_other_way_stays_as_it_is(monkeypatch):
    composed, _ = both(Turn(swapped=True), monkeypatch)
    assert "rotary" not in composed


def test_module_and_written_out_norm_are_one():
    x = (torch.randn(2, 24),)
    a, b = lower(nn.RMSNorm(24, eps=1e-5), x), lower(Norm(), x)
    assert [op.kind for op in a.ops] == [op.kind for op in b.ops] == ["rms_norm"]
    assert compose(a).ops == a.ops

"""Roundings that are learned: what they compute is what their codes say."""

import pytest
import torch

from pennyweight.ranges.minmax import MinMax
from pennyweight.reconstruction.soften import SignRounding, SoftRounding
from pennyweight.solvers import solvers
from pennyweight.spec import QuantSpec

SPECS = ["int3[8]", "uint4[8]+z", "int4n[1,*]", "int4[8]^fp16"]


@pytest.fixture
def weight():
    return torch.randn(6, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("text", SPECS)
@pytest.mark.parametrize("stretch", [False, True])
def test_what_is_learned_by_signs_is_what_is_stored(weight, text, stretch):
    q = solvers["rtn"](weight, QuantSpec.parse(text), MinMax())
    rounding = SignRounding(weight, q, stretch)
    torch.testing.assert_close(rounding(weight), q.dequantize())
    made = torch.Generator().manual_seed(1)
    for p, low, high in rounding.signed():
        p.data.copy_(torch.rand(p.shape, generator=made) * (high - low) + low)
    stored = rounding.codes()
    if not text.endswith("fp16") or not stretch:  # scales in half precision are rounded once more
        torch.testing.assert_close(stored.dequantize(), rounding(weight).detach())
    assert stored.spec == q.spec
    assert torch.equal(stored.scales(), q.scales()) != stretch
    assert not torch.equal(stored.codes, q.codes)


def test_a_stretch_has_the_gradient_of_a_learned_step(weight):
    q = solvers["rtn"](weight * 3, QuantSpec.parse("int3[1,*]"), MinMax())  # a third of the range is used
    rounding = SignRounding(weight, q, True)
    rounding(weight).sum().backward()
    steps = weight / q.scales()
    want = ((torch.round(steps) - steps) * q.scales()).sum(1, keepdim=True)
    torch.testing.assert_close(rounding.stretch.grad, want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(rounding.logits.grad, q.scales().expand(6, 16))
    plain = SignRounding(weight, q)
    assert [p is plain.logits for p, _, _ in plain.signed()] == [True]


def test_soft_rounding_starts_at_the_weight(weight):
    q = solvers["rtn"](weight, QuantSpec.parse("int8n[1,*]"), MinMax())
    rounding = SoftRounding(weight, q)
    inside = (weight / q.scales()).abs() < 127
    torch.testing.assert_close(
        rounding(weight)[inside], weight[inside], atol=2e-2 * float(q.scales().max()), rtol=0
    )

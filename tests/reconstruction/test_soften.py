"""Roundings that are learned: what they compute is what their codes say."""

import pytest
import torch

from pennyweight.qtensor import QTensor
from pennyweight.ranges.minmax import MinMax
from pennyweight.reconstruction.soften import FreeRounding, SignRounding, SoftRounding
from pennyweight.solvers import solvers
from pennyweight.spec import QuantSpec

SPECS = ["int3[8]", "uint4[8]+z", "int4n[1,*]", "int4[8]^fp16"]


@pytest.fixture
def weight():
    return torch.randn(6, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("text", SPECS)
def test_what_is_learned_by_signs_is_what_is_stored(weight, text):
    q = solvers["rtn"](weight, QuantSpec.parse(text), MinMax())
    rounding = SignRounding(weight, q)
    torch.testing.assert_close(rounding(weight), q.dequantize())
    rounding.logits.data += torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) - 0.5
    stored = rounding.codes()
    torch.testing.assert_close(stored.dequantize(), rounding(weight).detach())
    assert stored.spec == q.spec
    assert torch.equal(stored.scales(), q.scales())
    assert not torch.equal(stored.codes, q.codes)


def test_signed_rounding_has_the_gradient_of_a_step(weight):
    q = solvers["rtn"](weight * 3, QuantSpec.parse("int3[1,*]"), MinMax())  # a third of the range is used
    rounding = SignRounding(weight, q)
    rounding(weight).sum().backward()
    torch.testing.assert_close(rounding.logits.grad, q.scales().expand(6, 16))


def test_soft_rounding_starts_at_the_weight(weight):
    q = solvers["rtn"](weight, QuantSpec.parse("int8n[1,*]"), MinMax())
    rounding = SoftRounding(weight, q)
    inside = (weight / q.scales()).abs() < 127
    torch.testing.assert_close(
        rounding(weight)[inside], weight[inside], atol=2e-2 * float(q.scales().max()), rtol=0
    )


@pytest.mark.parametrize("text", SPECS)
def test_free_weights_are_what_is_stored(weight, text):
    q = solvers["rtn"](weight, QuantSpec.parse(text), MinMax())
    rounding = FreeRounding(weight, q)
    torch.testing.assert_close(rounding(weight), q.dequantize())
    made = torch.Generator().manual_seed(1)
    rounding.place.data += torch.randn(weight.shape, generator=made) * 3  # beyond the ends of the grid, too
    rounding.stretch.data += torch.randn(rounding.stretch.shape, generator=made) * 0.1
    stored = rounding.codes()
    if not text.endswith("fp16"):  # scales in half precision are rounded once more
        torch.testing.assert_close(stored.dequantize(), rounding(weight).detach())
    assert stored.spec == q.spec
    assert stored.codes.dtype == q.codes.dtype
    assert not torch.equal(stored.codes, q.codes)
    assert not torch.equal(stored.scales(), q.scales())


def test_free_weights_start_from_what_a_solver_chose(weight):
    q = solvers["rtn"](weight, QuantSpec.parse("int4n[1,*]"), MinMax())
    other = QTensor(
        (q.codes + (torch.arange(16) % 3 == 0)).clamp(-7, 7).to(q.codes.dtype), q.scale, None, q.spec
    )
    torch.testing.assert_close(FreeRounding(weight, other)(weight), other.dequantize())
    torch.testing.assert_close(FreeRounding(weight, q).place.detach(), weight / q.scales())


def test_free_weights_have_the_gradients_of_levels_and_scales(weight):
    q = solvers["rtn"](weight * 3, QuantSpec.parse("int3[1,*]"), MinMax())  # a third of the range is used
    rounding = FreeRounding(weight, q)
    rounding(weight).sum().backward()
    torch.testing.assert_close(rounding.place.grad, q.scales().expand(6, 16))
    torch.testing.assert_close(rounding.stretch.grad, rounding(weight).detach().sum(1, keepdim=True))

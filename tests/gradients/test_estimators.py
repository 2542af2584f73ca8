"""Every estimator: values on the grid, gradients as its docstring says, what is learned survives conversion."""

import math

import pytest
import torch

from pennyweight import kernels as kernels
from pennyweight.gradients import estimators
from pennyweight.gradients.affine import bounds, lsq_gain, positive_bound, rounded
from pennyweight.kernels import native
from pennyweight.qtensor import QParams, quantize
from pennyweight.runtime.library import supported_isas
from pennyweight.spec import QuantSpec

WEIGHTS = [n for n, e in estimators.items() if "weight" in e.serves]
INPUTS = [n for n, e in estimators.items() if "input" in e.serves]
SPECS = ["int8n[1,*]", "int4[1,*]", "int4[8]", "int2[1,*]", "int8n[*]", "uint4[8]+z"]


def leaf(x):
    return x.clone().requires_grad_()


def held_of(estimator, params, spec):
    held = {
        "scale": params.scale,
        "zero": torch.zeros_like(params.scale) if params.zero is None else params.zero,
    }
    return held | {k: leaf(v) for k, v in estimator.start(params, spec).items()}


@pytest.mark.parametrize("text", SPECS)
@pytest.mark.parametrize("name", WEIGHTS)
def test_values_are_those_of_the_codes(name, text):
    torch.manual_seed(0)
    spec, estimator = QuantSpec.parse(text), estimators[name]
    w = torch.randn(6, 16)
    held = held_of(estimator, estimator.first(estimator.latent(w), spec), spec)
    y = estimator.round(w, held, spec, 16)
    params = estimator.params({k: v.detach() for k, v in held.items()}, spec)
    q = quantize(
        estimator.latent(w), spec, QParams(params.scale, params.zero if spec.zero != "none" else None)
    )
    assert torch.equal(y.detach(), q.dequantize())


@pytest.mark.parametrize("name", [n for n in WEIGHTS if n not in ("apot", "dorefa", "ewgs")])
def test_gradient_is_one_inside_and_zero_outside(name):
    spec, estimator = QuantSpec.parse("int4[*]"), estimators[name]
    held = held_of(estimator, QParams(torch.full((1, 1), 0.25)), spec)
    x = leaf(torch.tensor([[-9.0, -2.01, -1.9, 0.0, 0.3, 1.74, 1.76, 9.0]]))
    estimator.round(x, held, spec, 8).sum().backward()
    assert x.grad.tolist() == [[0, 0, 1, 1, 1, 1, 0, 0]]


def reference_lsq(x, s, low, high, g):
    """Autograd's own derivative of the paper's formula, straight-through written out."""
    t = x / s
    r = torch.clamp(t, low, high)
    return ((torch.round(r) - r).detach() + r) * s, g


@pytest.mark.parametrize("text", ["int8n[1,*]", "int4[1,*]", "int4[8]", "int2[*]"])
def test_lsq_gradient_of_the_step(text):
    torch.manual_seed(1)
    spec = QuantSpec.parse(text)
    low, high = bounds(spec)
    x = torch.randn(5, 16) * 3
    shape = spec.scale_shape((5, 16))
    s = leaf(torch.rand(shape) * 0.3 + 0.1)
    g = torch.randn(5, 16)
    gain = lsq_gain(spec, 16)
    y = estimators["lsq"].round(x, {"scale": s, "zero": torch.zeros(shape)}, spec, 16)
    y.backward(g)
    s2 = leaf(s.detach())
    wide = s2
    for axis in range(2):
        wide = wide.repeat_interleave(x.shape[axis] // shape[axis], axis)
    value, _ = reference_lsq(x, wide, low, high, gain)
    value.backward(g)
    assert torch.allclose(y.detach(), value.detach(), atol=1e-6)
    assert torch.allclose(s.grad, s2.grad * gain, rtol=1e-4, atol=1e-5)


def test_pact_learns_from_what_it_clips_alone():
    spec, estimator = QuantSpec.parse("uint4[*]"), estimators["pact"]
    held = held_of(estimator, QParams(torch.full((1,), 0.1)), spec)
    x = torch.tensor([-1.0, 0.2, 0.77, 1.6, 5.0])
    estimator.round(x, held, spec, 5).sum().backward()
    assert held["scale"].grad.item() == pytest.approx(2 * 15)  # two values above alpha = 15 s


def test_lsq_plus_moves_the_zero_point_for_clipped_values_only():
    spec, estimator = QuantSpec.parse("uint4[*]+z"), estimators["lsq+"]
    held = held_of(estimator, QParams(torch.full((1,), 0.5), torch.full((1,), 4.0)), spec)
    x = torch.tensor([-7.0, 0.1, 1.0, 30.0, 40.0])
    estimator.round(x, held, spec, 5).sum().backward()
    assert held["zero"].grad.item() == pytest.approx(-0.5 * 3 * lsq_gain(spec, 5))


def test_ewgs_scales_by_the_distance_to_the_code():
    spec = QuantSpec.parse("int4[*]")
    x, g = leaf(torch.tensor([0.3, -0.4, 0.9, 99.0])), torch.tensor([2.0, -1.0, 0.0, 1.0])
    rounded(x, torch.ones(1), None, spec, delta=0.5).backward(g)
    t = x.detach()
    want = g * (1 + 0.5 * torch.sign(g) * (t - torch.round(t)))
    want[3] = 0
    assert torch.allclose(x.grad, want)


def test_tqt_scales_are_powers_of_two():
    spec, estimator = QuantSpec.parse("int4[*]"), estimators["tqt"]
    held = estimator.start(QParams(torch.tensor([[0.3]])), spec)
    scale = estimator.params(held, spec).scale.item()
    assert math.log2(scale) == round(math.log2(scale))
    assert 0.3 <= scale <= 0.6


def test_gain_is_that_of_the_paper():
    assert positive_bound(QuantSpec.parse("uint2[*]")) == 3
    assert lsq_gain(QuantSpec.parse("int4[1,*]"), 63) == pytest.approx(1 / math.sqrt(63 * 7))


def test_nan_stays_visible():
    x = torch.tensor([1.0, float("nan"), -1.0])
    y = rounded(x, torch.ones(1), None, QuantSpec.parse("int8[*]"))
    assert torch.isnan(y).tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 100_003), (7, 33), (64, 576), (300, 1)])
@pytest.mark.parametrize("isa", supported_isas() if native.backend() == "native" else ["none"])
def test_every_instruction_set_equals_plain_torch(monkeypatch, isa, dtype, rows, columns):
    if native.backend() != "native":
        pytest.skip("there is no libpennyweight here")
    monkeypatch.setenv("PENNYWEIGHT_ISA", isa)
    torch.manual_seed(0)
    data = (torch.randn(rows, columns) * 4).to(dtype)
    scale, zero, g = (
        torch.rand(rows) * 0.4 + 0.05,
        torch.randint(0, 9, (rows,)).float(),
        torch.randn(rows, columns),
    )

    def run():
        x, s = leaf(data), leaf(scale)
        y = torch.ops.pennyweight.fake_quantize(x, s, zero, 0.0, 15.0, 0.1, 0.5, 0)
        y.backward(g.to(dtype))
        return y.detach(), x.grad, s.grad

    mine = run()
    monkeypatch.setenv("PENNYWEIGHT_ISA", "scalar")
    defined = run()
    assert all(torch.equal(a, b) for a, b in zip(mine, defined, strict=True))  # sums too: one order for all
    monkeypatch.setenv("PENNYWEIGHT_EAGER", "reference")
    theirs = run()
    assert torch.equal(mine[0], theirs[0])
    assert torch.allclose(mine[1].float(), theirs[1].float(), atol=1e-6 if dtype == torch.float32 else 2e-2)
    assert torch.allclose(mine[2], theirs[2], rtol=1e-3, atol=1e-3 * math.sqrt(columns))

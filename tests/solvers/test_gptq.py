"""GPTQ: smaller output errors than nearest rounding, scales from the right weights, and what makes it fail."""

import pytest
import torch

from pennyweight.errors import NonFinite, SolverError
from pennyweight.qtensor import per_block
from pennyweight.ranges import ranges
from pennyweight.solvers import input_solvers, solvers
from pennyweight.solvers.gptq import gptq
from pennyweight.spec import QuantSpec

MINMAX = ranges["minmax"]()


def problem(rows=48, columns=64, seed=0):
    """A weight and correlated inputs [n, in] of channels of different size."""
    gen = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=gen) / columns**0.5 + torch.eye(columns) * 0.1
    x = torch.randn(1024, columns, generator=gen) @ mix * torch.logspace(-1, 1, columns)
    return torch.randn(rows, columns, generator=gen), x


def loss(weight, q, x):
    return float(((weight - q.dequantize()) @ x.T).pow(2).mean())


def test_it_is_registered():
    assert input_solvers["gptq"] is gptq


@pytest.mark.parametrize("text", ["int4[1,*]", "int4[*]", "int3n[1,*]", "int4[1,32]", "int4[1,16]+z", "nf4[1,32]", "int4[1,32]^fp16"])  # fmt: skip
@pytest.mark.parametrize("act_order", [True, False, "groups"])
def test_output_errors_fall(text, act_order):
    spec, (weight, x) = QuantSpec.parse(text), problem()
    q = gptq(weight, spec, MINMAX, x.T @ x / len(x), act_order=act_order, block=32)
    nearest = solvers["rtn"](weight, spec, MINMAX)
    assert q.codes.dtype == nearest.codes.dtype
    worst = 0.5 if act_order else 0.95  # large channels come last here
    assert loss(weight, q, x) < worst * loss(weight, nearest, x)


def test_order_helps():
    """On average over problems, as published."""
    spec, ratio = QuantSpec.parse("int3[1,*]"), 1.0
    for seed in range(4):
        weight, x = problem(seed=seed)
        gram = x.T @ x / len(x)
        with_order, without = (gptq(weight, spec, MINMAX, gram, act_order=o) for o in (True, False))
        ratio *= loss(weight, with_order, x) / loss(weight, without, x)
    assert ratio < 1


def test_scales_of_groups_come_from_updated_weights():
    """The first group's are those of the weight, later ones are not; with the order they all are."""
    spec, (weight, x) = QuantSpec.parse("int4[1,16]"), problem()
    gram = x.T @ x / len(x)
    given = solvers["rtn"](weight, spec, MINMAX).scales()
    late = gptq(weight, spec, MINMAX, gram, act_order=False, block=128).scales()
    assert torch.equal(late[:, 0], given[:, 0])
    assert (late[:, 1:] - given[:, 1:]).abs().max() > 1e-3
    assert torch.equal(gptq(weight, spec, MINMAX, gram, act_order=True).scales(), given)


@pytest.mark.parametrize("parts", [1, 2])
def test_groups_in_the_order_of_their_largest_input_keep_their_places(parts):
    """Columns that come in that order already, turned about: the same codes and scales, turned about."""
    spec, (weight, x) = QuantSpec.parse("int3[1,16]+z"), problem(columns=64)
    gram = x.T @ x / len(x)
    order = torch.argsort(gram.diagonal().view(4, 16).amax(1), descending=True)
    order = torch.cat(
        [16 * g + torch.argsort(gram.diagonal()[16 * g : 16 * g + 16], descending=True) for g in order]
    )
    sorted_gram = gram[order][:, order]
    grams = [g if parts == 1 else g.expand(parts, -1, -1) for g in (gram, sorted_gram)]
    found = gptq(weight, spec, MINMAX, grams[0], act_order="groups")
    plain = gptq(weight[:, order], spec, MINMAX, grams[1], act_order=False)
    assert torch.equal(found.codes[:, order], plain.codes)
    assert torch.equal(found.dequantize()[:, order], plain.dequantize())


@pytest.mark.parametrize("block", [16, 24, 64, 128])
def test_blocks_change_rounding_errors_alone(block):
    spec, (weight, x) = QuantSpec.parse("int4[1,16]"), problem()
    gram = x.T @ x / len(x)
    one = gptq(weight, spec, MINMAX, gram, act_order=False, block=128)
    other = gptq(weight, spec, MINMAX, gram, act_order=False, block=block)
    assert float((one.codes != other.codes).float().mean()) < 0.02


def test_white_inputs_leave_nearest_rounding():
    spec, (weight, _) = QuantSpec.parse("int4[1,*]"), problem()
    q = gptq(weight, spec, MINMAX, torch.eye(weight.shape[1]))
    assert torch.equal(q.codes, solvers["rtn"](weight, spec, MINMAX).codes)


def test_groups_of_rows_have_their_own_inputs():
    spec = QuantSpec.parse("int3[1,*]")
    weights, inputs = zip(*(problem(rows=6, columns=9, seed=s) for s in range(5)), strict=True)
    grams = torch.stack([x.T @ x / len(x) for x in inputs])
    together = gptq(torch.cat(weights), spec, MINMAX, grams)
    apart = [gptq(w, spec, MINMAX, g) for w, g in zip(weights, grams, strict=True)]
    assert torch.equal(together.codes, torch.cat([q.codes for q in apart]))


def test_dead_columns_become_zero():
    spec, (weight, x) = QuantSpec.parse("int4[1,*]"), problem()
    x[:, 5] = 0
    q = gptq(weight, spec, MINMAX, x.T @ x / len(x))
    assert not q.codes[:, 5].any()
    assert q.codes[:, 4].any()


def test_few_inputs_are_damped():
    spec, (weight, x) = QuantSpec.parse("int4[1,*]"), problem()
    x = x[:3]
    q = gptq(weight, spec, MINMAX, x.T @ x / len(x), damp=0.0)
    assert loss(weight, q, x) < loss(weight, solvers["rtn"](weight, spec, MINMAX), x)


def test_refusals():
    spec, (weight, x) = QuantSpec.parse("int4[1,*]"), problem()
    gram = x.T @ x / len(x)
    with pytest.raises(SolverError, match="does not fit"):
        gptq(weight, spec, MINMAX, gram[:5, :5])
    with pytest.raises(SolverError, match="positive definite"):
        gptq(weight, spec, MINMAX, torch.full_like(gram, 1e6).fill_diagonal_(1.0))
    with pytest.raises(NonFinite):
        gptq(weight, spec, MINMAX, gram * float("nan"))


def test_scales_are_those_of_the_codes():
    """Every block uses its range: the codes' extremes are reached."""
    spec, (weight, x) = QuantSpec.parse("int4n[1,32]"), problem()
    q = gptq(weight, spec, MINMAX, x.T @ x / len(x), act_order=False)
    assert per_block(q.codes.float(), tuple(q.scales().shape)).abs().amax(-1).min() >= 6

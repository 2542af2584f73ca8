"""Incremental quantization: shares as said, what is held stays, the end is on the grid and converts exactly."""

import copy

import pytest
import torch
import torch.nn.functional as F

import pennyweight as pw
from pennyweight import training
from pennyweight.errors import InputError
from pennyweight.nn.rounding import trained
from pennyweight.passes.calibrate import Calibrate
from pennyweight.passes.fold_batch_norm import FoldBatchNorm
from pennyweight.passes.solve import Solve
from pennyweight.passes.train import Train
from pennyweight.plan import Rule
from pennyweight.recipe import Recipe
from pennyweight.spec import QuantSpec

STEPS = (2, 4, 6, 8)


def prepared(small, batch, grid="pot4[*]", weight="clipped"):
    rules = (Rule(weight=QuantSpec.parse(grid), input=QuantSpec.parse("uint8[*]+z")),)
    passes = (FoldBatchNorm(), Train(weight, "clipped"), Calibrate(), Solve())
    model = training.prepare(small, batch[0], Recipe("inq", rules, passes))
    pw.calibrate(model, [batch[0]])
    return model


def learn(model, batch, schedule, steps, start=0, optimizer=None):
    optimizer = optimizer or torch.optim.SGD(model.parameters(), 0.05, 0.9, weight_decay=1e-2)
    for step in range(start, steps):
        schedule.apply(model, step)
        torch.manual_seed(step)
        loss = F.cross_entropy(model(batch[0]), batch[1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield step


def layers(model):
    return {name: getattr(model, name) for name in ("conv1", "conv2", "head")}


@pytest.mark.parametrize(
    ("grid", "weight"), [("pot4[*]", "clipped"), ("pot3[1,*]", "lsq"), ("apot4[1,*]", "clipped")]
)
def test_parts_are_held_while_the_rest_trains(small, batch, grid, weight):
    model = prepared(small, batch, grid, weight)
    schedule = training.INQSchedule(steps=STEPS)
    before, chosen = {}, {}
    for step in learn(model, batch, schedule, 10):
        part = sum(s <= step for s in STEPS)
        for name, layer in layers(model).items():
            quantizer = trained(layer)["weight"]
            if not part:
                assert quantizer.pinned is None
                continue
            now = quantizer.pinned
            held = ~torch.isnan(now)
            assert int(held.sum()) == int(schedule.shares[part - 1] * held.numel())
            if name in before:
                was = ~torch.isnan(before[name])
                assert torch.equal(before[name][was], now[was])  # held weights do not move
                assert step in STEPS or torch.equal(was, held)
            if step == STEPS[0]:
                chosen[name] = held
            before[name] = now.clone()
            # what the forward pass sees: levels where it is held, the weight itself elsewhere
            seen, w = quantizer(layer.weight.flatten(1)), layer.weight.flatten(1)
            assert torch.equal(seen[held], now[held])
            assert torch.equal(seen[~held], w[~held])
            assert layer.weight.grad.flatten(1)[held].abs().max() == 0
            if step + 1 < STEPS[-1]:
                assert layer.weight.grad.abs().max() > 0
    schedule.apply(model, 10)
    for name, layer in layers(model).items():
        quantizer = trained(layer)["weight"]
        matrix = layer.weight.detach().flatten(1)
        assert torch.equal(quantizer.codes(matrix).dequantize(), matrix)  # every weight is on the grid
        assert chosen[name].any()
        assert not chosen[name].all()
        if grid.startswith("pot"):
            assert torch.equal(torch.log2(quantizer.scale), torch.log2(quantizer.scale).round())
    model.eval()
    with torch.no_grad():
        there, integer = model(batch[0]), pw.convert(model)(batch[0])
    assert float(((there - integer) ** 2).sum() / (there**2).sum()) < 1e-3


def test_the_largest_go_first_into_the_ranges_of_the_paper(small, batch):
    model = prepared(small, batch)
    sizes = small.conv2.weight.detach().abs().flatten(1).clone()
    top = float(sizes.max())
    training.INQSchedule(steps=STEPS).apply(model, 2)
    quantizer = trained(model.conv2)["weight"]
    held = ~torch.isnan(quantizer.pinned)
    assert float(sizes[held].min()) >= float(sizes[~held].max())
    n1 = torch.floor(torch.log2(torch.tensor(4 * top / 3)))
    assert float(quantizer.scale) == float(2**n1)
    assert set(quantizer.pinned[held].abs().tolist()) <= {float(2 ** (n1 - i)) for i in range(7)} | {0.0}


def test_resumes_in_the_middle(small, batch):
    schedule = training.INQSchedule(steps=STEPS)
    model = prepared(copy.deepcopy(small), batch)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, 0.9)
    for step in learn(model, batch, schedule, 10, optimizer=optimizer):
        if step == 4:
            state, momentum = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    other = prepared(copy.deepcopy(small), batch)
    other.load_state_dict(state)
    second = torch.optim.SGD(other.parameters(), 0.05, 0.9)
    second.load_state_dict(momentum)
    list(learn(other, batch, schedule, 10, start=5, optimizer=second))
    for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(a.nan_to_num(), b.nan_to_num())


def test_what_cannot_be_is_refused(small, batch):
    for steps, shares in [
        ((0, 5), (0.5, 0.75, 1.0)),
        ((5, 0), (0.5, 1.0)),
        ((0, 5), (0.5, 0.9)),
        ((-1,), (1.0,)),
    ]:
        with pytest.raises(InputError):
            training.INQSchedule(steps=steps, shares=shares)
    with pytest.raises(InputError, match="no weight"):
        training.INQSchedule(steps=STEPS).apply(small, 0)
    with pytest.raises(InputError, match="bent"):
        training.INQSchedule(steps=STEPS).apply(prepared(small, batch, weight="dorefa"), 3)

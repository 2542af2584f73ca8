"""Networks of signs: trained in two steps, converted, and run as one program that agrees."""

import numpy as np
import pytest
import torch
from torch import nn

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

SIGN, SIGNAL = QuantSpec.parse("binary[1,*]"), QuantSpec.parse("binary[*]")
EIGHT, CODES = QuantSpec.parse("int8n[1,*]"), QuantSpec.parse("uint8[*]+z")


def recipe(slope):
    rules = (
        Rule("2", weight=SIGN, input=SIGNAL),
        Rule("6", weight=SIGN, input=SIGNAL),
        Rule(weight=EIGHT, input=CODES, optional=True),
    )
    train = Train("signs", "signs", {"slope": slope}, {"slope": slope})
    return Recipe("signs", rules, (FoldBatchNorm(), train, Calibrate(), Solve()))


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), training.RSign(16),
        nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), training.RPReLU(16), training.RSign(16),
        nn.Conv2d(16, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
    )  # fmt: skip


def batches():
    """Four kinds of stripes."""
    torch.manual_seed(1)
    rows = torch.arange(8.0).reshape(1, 1, 8, 1)
    for _ in range(30):
        kind = torch.randint(0, 4, (16,))
        waves = torch.cos(rows * (kind + 1).reshape(-1, 1, 1, 1)).expand(16, 1, 8, 8)
        yield waves + 0.1 * torch.randn(16, 1, 8, 8), kind


@pytest.mark.parametrize("slope", ["approx", "ede"])
def test_two_steps_then_integers(slope):
    prepared = training.prepare(network(), next(batches())[0], recipe(slope))
    total = 60
    schedule = training.SignSchedule(weights=20, total=total)
    twin = prepared[2]
    schedule.apply(prepared, 0)
    assert not trained(twin)["weight"].active
    with torch.no_grad():
        twin.weight[0, 0, 0, 0] = 7.0
    schedule.apply(prepared, 20)
    assert trained(twin)["weight"].active
    assert float(twin.weight.detach().abs().max()) <= 1
    done = training.fit(
        prepared, batches, epochs=2, steps_per_epoch=30, lr=0.05, schedule=schedule, progress=False
    )
    assert done.losses[-1] < done.losses[0]
    if slope == "ede":
        assert trained(twin)["weight"].estimator.progress > 0.9
    x, kind = next(batches())
    integer = pw.convert(prepared)
    assert integer[2].mode == integer[6].mode == "binary"
    with torch.no_grad():
        # a value next to a threshold may fall on its other side: a few results differ, most do not
        assert float((integer(x) - prepared(x)).abs().median()) < 0.02
    program = pw.lower(integer, x)
    got = next(iter(pw.interpret(program, {next(iter(program.inputs)): x.numpy()}).values()))
    assert (got.argmax(1) == kind.numpy()).mean() > 0.5
    assert float(np.median(np.abs(got - integer(x).detach().numpy()))) < 0.02


def test_negative_steps_are_refused():
    with pytest.raises(InputError, match="weights"):
        training.SignSchedule(weights=-1)


def test_shifts_by_hand():
    x = torch.tensor([[[-2.0, 0.5]]])
    sign, act = training.RSign(1), training.RPReLU(1)
    with torch.no_grad():
        sign.shift.fill_(1.0)
        act.before.fill_(0.5)
        act.after.fill_(0.1)
    assert torch.equal(sign(x), x + 1)
    torch.testing.assert_close(act(x).detach(), torch.tensor([[[-2.5 * 0.25 + 0.1, 0.1]]]))

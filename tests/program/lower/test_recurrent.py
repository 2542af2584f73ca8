"""Recurrent layers in float: their program is torch's computation, step by step."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from pennyweight.errors import LowerError
from pennyweight.program.interpret import interpret
from pennyweight.program.lower import lower


@pytest.fixture(autouse=True)
def _inference():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def leaves(x):
    return [t for t in tree_leaves(x) if isinstance(t, torch.Tensor)]


def check(model, program, *batch):
    arrays = {n: t.numpy() for n, t in zip(program.inputs, leaves(batch), strict=True)}
    got = interpret(program, arrays)
    for want, name in zip(leaves(model(*batch)), program.outputs, strict=True):
        assert np.allclose(want.numpy(), got[name], atol=1e-6)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize(
    "options",
    [{}, {"batch_first": True, "num_layers": 2, "bidirectional": True}, {"bias": False, "batch_first": True}],
)
def test_sequences(kind, options):
    model = kind(4, 5, **options).eval()
    program = lower(model, torch.randn(3, 3, 4))
    assert "linear_f32" in {op.kind for op in program.ops}
    first = options.get("batch_first", False)
    check(model, program, torch.randn(3, 3, 4))
    check(model, program, torch.randn(7, 3, 4) if first else torch.randn(3, 7, 4))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_given_states(kind):
    model = kind(4, 5, num_layers=2, batch_first=True).eval()

    def batch(rows):
        h = torch.randn(2, rows, 5)
        return torch.randn(rows, 3, 4), (h, h + 1) if kind is nn.LSTM else h

    program = lower(model, batch(3), dynamic={0: (0,), 1: (1,)})
    check(model, program, *batch(3))
    check(model, program, *batch(6))


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell])
def test_cells(kind):
    model = kind(4, 5).eval()
    x, h = torch.randn(3, 4), torch.randn(3, 5)
    given = (h, h + 1) if kind is nn.LSTMCell else h
    program = lower(model, (x, given), dynamic={0: (0,), 1: (0,)})
    check(model, program, x, given)
    x, h = torch.randn(8, 4), torch.randn(8, 5)
    check(model, program, x, (h, h + 1) if kind is nn.LSTMCell else h)


@pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning")
def test_projected_states_are_refused():
    with pytest.raises(LowerError, match="projects its states"):
        lower(nn.LSTM(4, 5, proj_size=2).eval(), torch.randn(3, 2, 4))


def test_an_open_length_is_refused_by_name():
    with pytest.raises(LowerError, match="fixes the size of axis 0"):
        lower(nn.LSTM(4, 5).eval(), torch.randn(3, 2, 4), dynamic={0: (0, 1)})

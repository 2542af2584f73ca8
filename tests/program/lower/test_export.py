"""Which sizes stay open in a program."""

import numpy as np
import pytest
import torch
from torch import nn

from pennyweight.errors import LowerError
from pennyweight.program.interpret import interpret
from pennyweight.program.lower import lower


@pytest.fixture(autouse=True)
def _inference():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def check(model, program, *batches):
    for batch in batches:
        arrays = {n: t.numpy() for n, t in zip(program.inputs, batch, strict=True)}
        want = model(*batch)
        got = interpret(program, arrays)[program.outputs[0]]
        assert np.allclose(want.numpy(), got, atol=1e-5)


class Pooled(nn.Module):
    """Frames [N, T, F] to one vector each."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 3)

    def forward(self, x):
        return self.fc(x).mean(1)


class Last(nn.Module):
    """The last frame of each sequence, found the way most people write it."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 3)

    def forward(self, x, n):
        return self.fc(x)[torch.arange(len(x)), n - 1]


def test_length_of_float_sequences_stays_open():
    model = Pooled().eval()
    program = lower(model, torch.randn(2, 5, 6))
    assert program.inputs["x"].shape == ("batch", "length", 6)
    check(model, program, (torch.randn(2, 5, 6),), (torch.randn(7, 3, 6),), (torch.randn(1, 1, 6),))


@pytest.mark.parametrize("shape", [(1, 5, 6), (2, 1, 6), (4, 4, 6), (1, 1, 6)])
def test_whatever_the_example(shape):
    model = Pooled().eval()
    program = lower(model, torch.randn(shape))
    if shape[1] != 1:  # a length of 1 in the example may be meant
        assert program.inputs["x"].shape == ("batch", "length", 6)
        check(model, program, (torch.randn(3, 8, 6),))
    check(model, program, (torch.randn(3, *shape[1:]),))


def test_channels_of_a_convolution_close_without_a_word():
    model = nn.Sequential(
        nn.Conv1d(4, 5, 3), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(5, 2)
    )
    program = lower(model.eval(), torch.randn(2, 4, 9))
    assert program.inputs["input"].shape == ("batch", 4, 9)
    assert "fixed" not in program.meta
    check(model, program, (torch.randn(5, 4, 9),))


def test_len_keeps_the_batch_open():
    model = Last().eval()
    program = lower(model, (torch.randn(3, 5, 6), torch.tensor([1, 5, 2])))
    assert program.inputs["x"].shape == ("batch", "length", 6)
    assert program.inputs["n"].shape == ("batch",)
    assert "fixed" not in program.meta
    check(
        model,
        program,
        (torch.randn(2, 4, 6), torch.tensor([4, 1])),
        (torch.randn(1, 9, 6), torch.tensor([3])),
    )


class Fixed(nn.Module):
    """Reshapes to a batch of two."""

    def forward(self, x):
        return x.reshape(2, -1) * 2


def test_a_model_that_fixes_its_batch_says_so():
    program = lower(Fixed(), torch.randn(2, 6))
    assert program.inputs["x"].shape == (2, 6)
    assert "axis 0 of input 'x'" in program.meta["fixed"]


def test_an_axis_that_was_asked_for_must_stay_open():
    with pytest.raises(LowerError, match="fixes the size of axis 0 of input 'x'"):
        lower(Fixed(), torch.randn(2, 6), dynamic={"x": (0,)})


def test_axes_by_name_or_position():
    model = Pooled().eval()
    for dynamic in ({"x": (1,)}, {0: (1,)}):
        program = lower(model, torch.randn(2, 5, 6), dynamic=dynamic)
        assert program.inputs["x"].shape == (2, "length", 6)
    by_name = lower(model, {"x": torch.randn(2, 5, 6)}, dynamic={"x": (0,)})
    assert by_name.inputs["x"].shape == ("batch", 5, 6)
    assert lower(model, torch.randn(2, 5, 6), dynamic=False).inputs["x"].shape == (2, 5, 6)


def test_wrong_names_and_axes_are_refused():
    model, x = Pooled().eval(), torch.randn(2, 5, 6)
    with pytest.raises(LowerError, match=r"no input 'y'.*inputs: x"):
        lower(model, x, dynamic={"y": (0,)})
    with pytest.raises(LowerError, match="no input 1"):
        lower(model, x, dynamic={1: (0,)})
    with pytest.raises(LowerError, match=r"no such axis.*\(2, 5, 6\)"):
        lower(model, x, dynamic={"x": (3,)})


class Stateful(nn.Module):
    """States come nested, with the batch on axis 1."""

    def forward(self, x, state):
        h, c = state
        return x + h[0][:, None] + c[-1][:, None], (h * 2, c)


def test_states_in_a_tuple_vary_with_the_batch():
    model = Stateful()
    for rows in (1, 3):
        state = (torch.randn(2, rows, 6), torch.randn(2, rows, 6))
        program = lower(model, (torch.randn(rows, 5, 6), state))
        assert [t.shape for t in program.inputs.values()] == [
            ("batch", "length", 6), (2, "batch", 6), (2, "batch", 6)
        ]  # fmt: skip
        assert program.tree == [0, [1, 2]]
        with torch.no_grad():
            x, state = torch.randn(4, 2, 6), (torch.randn(2, 4, 6), torch.randn(2, 4, 6))
            want, (h, _) = model(x, state)
        names = list(program.inputs)
        got = interpret(program, dict(zip(names, [t.numpy() for t in (x, *state)], strict=True)))
        assert np.allclose(got[program.outputs[0]], want.numpy(), atol=1e-6)
        assert np.array_equal(got[program.outputs[1]], h.numpy())


def test_a_float_transformer_lowers_past_the_short_cuts():
    before = torch.backends.mha.get_fastpath_enabled()
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
    program = lower(model, torch.randn(2, 5, 8))
    assert torch.backends.mha.get_fastpath_enabled() == before
    check(model, program, (torch.randn(3, 7, 8),))


class Branching(nn.Module):
    """Control flow on values."""

    def forward(self, x):
        return x * 2 if x.sum() > 0 else x


def test_no_whole_graph_form_names_the_line():
    with pytest.raises(LowerError, match=r"test_export\.py:\d+ in forward"):
        lower(Branching(), torch.randn(2, 3))

"""The opaque ops `lstm`, `gru` and `attention` give the bits of the program ops of the same name."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pennyweight.kernels.recurrent import EXACT_IN_FLOAT32
from pennyweight.program.ops import definitions

GATES = {"lstm": (4, 2), "gru": (3, 1)}


def operands(kind, steps, rows, width, hidden, seed, per_row=True, biases=(True, True), spread=1.0):
    g = torch.Generator().manual_seed(seed)
    gates, states = GATES[kind]
    out = [torch.randn(steps, rows, width, generator=g) * spread]
    out += [torch.randn(rows, hidden, generator=g) for _ in range(states)]
    for n in (width, hidden):
        out.append(torch.randint(-127, 128, (gates * hidden, n), generator=g, dtype=torch.int8))
        out.append(torch.rand(gates * hidden if per_row else 1, generator=g) * 0.01 + 1e-4)
    out += [torch.randn(gates * hidden, generator=g) if b else None for b in biases]
    return out


def check(kind, values, reverse):
    got = getattr(torch.ops.pennyweight, kind)(*values, reverse)
    want = definitions[kind].run([None if v is None else v.numpy() for v in values], {"reverse": reverse})
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        assert np.array_equal(a.numpy().view(np.int32), b.view(np.int32))


@settings(max_examples=25, deadline=None)
@given(
    kind=st.sampled_from(["lstm", "gru"]), steps=st.integers(1, 6), rows=st.integers(1, 5),
    width=st.integers(1, 40), hidden=st.integers(1, 33), seed=st.integers(0, 999), reverse=st.booleans(),
    per_row=st.booleans(), b_ih=st.booleans(), b_hh=st.booleans(), spread=st.sampled_from([1e-3, 1.0, 100.0]),
)  # fmt: skip
def test_same_bits(kind, steps, rows, width, hidden, seed, reverse, per_row, b_ih, b_hh, spread):
    check(kind, operands(kind, steps, rows, width, hidden, seed, per_row, (b_ih, b_hh), spread), reverse)


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_same_bits_where_float32_no_longer_holds_the_sums(kind):
    check(kind, operands(kind, 2, 2, EXACT_IN_FLOAT32 + 300, 5, 1), False)


def test_float32_holds_the_sums_up_to_the_limit():
    n = EXACT_IN_FLOAT32
    assert n * 255 * 128 <= 1 << 24
    x = torch.full((1, n), 1.0)
    x[0, 0] = -1e-9  # the range reaches zero from both sides
    codes = torch.full((1, n), -128, dtype=torch.int8)
    values = [x[None], torch.zeros(1, 1), codes.repeat(3, 1), torch.ones(1)]
    check("gru", [*values, torch.zeros(3, 1, dtype=torch.int8), torch.ones(1), None, None], False)


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_states_are_copies(kind):
    values = operands(kind, 1, 2, 3, 4, 0)
    before = [v.clone() for v in values[1 : 1 + GATES[kind][1]]]
    getattr(torch.ops.pennyweight, kind)(*values, False)
    assert all(torch.equal(a, b) for a, b in zip(values[1:], before, strict=False))


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_fake_shapes(kind):
    values = operands(kind, 3, 2, 5, 4, 0)
    real = getattr(torch.ops.pennyweight, kind)(*values, False)
    meta = [None if v is None else v.to("meta") for v in values]
    fake = getattr(torch.ops.pennyweight, kind)(*meta, False)
    assert [tuple(t.shape) for t in fake] == [tuple(t.shape) for t in real]


@pytest.mark.parametrize(("causal", "masked"), [(False, False), (True, False), (False, True), (True, True)])
def test_attention_same_bits(causal, masked):
    g = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(2, 3, 7, 8, generator=g) for _ in range(3))
    mask = None
    if masked:
        mask = torch.where(torch.rand(2, 1, 7, 7, generator=g) < 0.3, -1e9, 0.0)
    params = [torch.tensor(x) for x in (0.03, 120.0, 0.025, 130.0, 0.02, 99.0)]
    got = torch.ops.pennyweight.attention(q, k, v, mask, causal, 8**-0.5, *params)
    codes = []
    for x, scale, zero in zip((q, k, v), params[::2], params[1::2], strict=True):
        attrs = {"scale": float(scale), "zero": int(zero), "lo": 0, "hi": 255}
        codes += definitions["quantize"].run([x.numpy()], attrs)
    factor = float(np.float32(np.float64(float(params[0])) * np.float64(float(params[2])) * 8**-0.5))
    attrs = {"q_zero": 120, "k_zero": 130, "v_zero": 99, "factor": factor, "causal": causal}
    (acc,) = definitions["attention"].run([*codes, None if mask is None else mask.numpy()], attrs)
    m = np.asarray([np.float64(float(params[4])) / 255.0], np.float32)
    (want,) = definitions["rescale"].run([acc, m], {})
    assert np.array_equal(got.numpy().view(np.int32), want.view(np.int32))

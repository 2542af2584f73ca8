"""Multipliers that are powers of two become shifts, with the same results; others stay."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pennyweight.program.interpret import interpret
from pennyweight.program.ir import Constant, Op, Program, TensorType
from pennyweight.program.ops.shifts import shifted
from pennyweight.program.rewrite.shifts import by_shifts, shift_of

BOUNDS = {"zero": 100, "lo": 0, "hi": 255}


@given(st.integers(-(2**31), 2**31 - 1), st.integers(-8, 23))
def test_shifting_rounds_half_to_even(value, shift):
    assert int(shifted(value, shift)) == round(Fraction(value) / Fraction(2) ** shift)


@pytest.mark.parametrize(
    ("multipliers", "shift"),
    [([0.5], 1), ([1.0, 1.0], 0), ([4.0], -2), ([0.5, 0.25], None), ([0.75], None), ([-0.5], None), ([2.0**-24], None),
     ([2.0**9], None), ([0.0], None)],
)  # fmt: skip
def test_which_multipliers_are_shifts(multipliers, shift):
    assert shift_of(np.float32(multipliers)) == shift


def program(multiplier, r_multiplier):
    """One requantization without and one with a residual."""
    inputs = {"acc": TensorType("i32", (2, 3)), "r": TensorType("u8", (2, 3))}
    ops = [
        Op("requant", ("acc", "m"), ("a",), dict(BOUNDS), "a"),
        Op(
            "requant_add",
            ("acc", "m", "r"),
            ("b",),
            {"r_zero": 7, "r_multiplier": r_multiplier, **BOUNDS},
            "b",
        ),
    ]
    return Program(inputs, ["a", "b"], ops, {"m": Constant("f32", np.float32([multiplier]))}, {}, [0, 1])


def test_results_are_the_same_within_24_bits():
    before = program(2.0**-7, 2.0**-1)
    after = by_shifts(before)
    assert [op.kind for op in after.ops] == ["requant_shift", "requant_add_shift"]
    rng = np.random.default_rng(0)
    for _ in range(50):
        acc = rng.integers(-(2**15), 2**15, (2, 3), dtype=np.int32)
        feed = {"acc": acc, "r": rng.integers(0, 256, (2, 3), dtype=np.uint8)}
        old, new = interpret(before, feed), interpret(after, feed)
        assert all(np.array_equal(old[k], new[k]) for k in old)


def test_a_residual_of_another_step_keeps_its_multiplier():
    kinds = [op.kind for op in by_shifts(program(2.0**-7, 0.3)).ops]
    assert kinds == ["requant_shift", "requant_add"]
    assert [op.kind for op in by_shifts(program(0.3, 0.5)).ops] == ["requant", "requant_add"]

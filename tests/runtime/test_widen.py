"""Stored halves are widened when a program is loaded, and nothing else changes."""

import numpy as np
import pytest

from pennyweight.errors import KernelError
from pennyweight.program.interpret import interpret
from pennyweight.program.ir import Constant, Op, Program, TensorType
from pennyweight.program.verify import verify
from pennyweight.runtime.session import Session
from pennyweight.runtime.widen import widened

rng = np.random.default_rng(0)


def recurrent() -> Program:
    """A GRU whose scales are stored in both half formats."""
    scale = (rng.random(12) * 0.02 + 0.001).astype(np.float32)
    constants = {
        "h": Constant("f32", np.zeros((2, 4), np.float32)),
        "w": Constant("i8", rng.integers(-127, 128, (12, 3)).astype(np.int8)),
        "u": Constant("i8", rng.integers(-127, 128, (12, 4)).astype(np.int8)),
        "ws": Constant("bf16", (scale.view(np.uint32) >> 16).astype(np.uint16)),
        "us": Constant("f16", scale.astype(np.float16)),
    }
    ops = [
        Op("cast", ("ws",), ("ws.wide",), {"dtype": "f32"}),
        Op("cast", ("us",), ("us.wide",), {"dtype": "f32"}),
        Op("gru", ("x", "h", "w", "ws.wide", "u", "us.wide"), ("y", "last"), {"reverse": False}),
        Op("cast", ("us",), ("shown",), {"dtype": "f32"}),
    ]
    inputs = {"x": TensorType("f32", ("length", 2, 3))}
    return Program(inputs, ["y", "last", "shown"], ops, constants, {"length": 5}, [0, 1, 2])


def test_same_values_without_the_casts():
    program = recurrent()
    other = widened(program)
    verify(other)
    assert [op.kind for op in other.ops] == ["gru", "cast"]  # an output stays an op
    assert other.constants["ws.wide"].dtype == "f32"
    x = {"x": rng.standard_normal((7, 2, 3)).astype(np.float32)}
    for a, b in zip(interpret(program, x).values(), interpret(other, x).values(), strict=True):
        assert np.array_equal(a, b)


def test_nothing_to_widen_is_the_same_program():
    program = recurrent()
    plain = widened(program)
    assert widened(plain) is plain


def test_native_session_takes_stored_halves():
    program = recurrent()
    try:
        session = Session(program, backend="native")
    except KernelError as error:
        pytest.skip(f"no native engine: {error.what}")
    x = rng.standard_normal((7, 2, 3)).astype(np.float32)
    for got, want in zip(session.run(x), interpret(program, {"x": x}).values(), strict=True):
        assert np.array_equal(got, want)
    assert program.constants["ws"].dtype == "bf16"

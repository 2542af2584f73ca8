"""Thresholds found by bisection give the very bits that the float arithmetic gives."""

import numpy as np
import pytest

from pennyweight.program.interpret import interpret
from pennyweight.program.ir import Constant, Op, Program, TensorType
from pennyweight.program.rewrite.clean import drop_dead
from pennyweight.program.rewrite.signs import lower_signs, threshold, values_of

F32 = np.float32


def test_keys_of_floats_ascend():
    keys = np.array([-0x7F800000, -0x7F7FFFFF, -1, 0, 1, 0x3F800000, 0x7F800000], np.int64)
    values = values_of(keys, "f32")
    assert values[0] == -np.inf
    assert values[-1] == np.inf
    assert values[5] == 1.0
    assert (np.diff(values.astype(np.float64)[1:-1]) > 0).all()


@pytest.mark.parametrize("dtype", ["i32", "u8", "f32"])
def test_threshold_is_exact(dtype):
    """Around every threshold, and at random, both sides say the same."""
    rng = np.random.default_rng(0)
    gain = np.array([0.3, -0.7, 1e-3, -2.5, 0.0, 0.0, 17.0], F32)
    shift = np.array([0.1, 3.0, -0.2, 0.0, 1.0, -1.0, -300.0], F32)

    def step(x):
        return x.astype(F32) * gain + shift

    t, flip = threshold(step, np.zeros(1, F32), dtype, len(gain))
    near = np.concatenate([t.astype(np.float64) + d for d in (-2, -1, 0, 1, 2)])
    x = np.concatenate([near, rng.normal(0, 100, 4000), [0, 255]])
    x = np.clip(np.rint(x), 0, 255) if dtype == "u8" else np.clip(x, -(2**30), 2**30)
    x = x.astype({"i32": np.int32, "u8": np.uint8, "f32": F32}[dtype])[:, None]
    if dtype == "f32":
        x = np.concatenate([x, np.nextafter(t, F32(np.inf))[:, None], np.nextafter(t, F32(-np.inf))[:, None]])
    x = x[np.isfinite(x).all(1)]  # an infinity times 0 is no number
    with np.errstate(all="ignore"):
        assert np.array_equal((x >= t) ^ (flip != 0), step(x) >= 0)


def signed(ops, inputs, constants):
    stored = {
        n: Constant({"float32": "f32", "int32": "i32", "uint8": "u8"}[str(a.dtype)], a)
        for n, a in constants.items()
    }
    return Program(inputs, ["y"], ops, stored, {}, 0)


def test_batch_norm_clip_and_sign_are_one_comparison():
    rng = np.random.default_rng(1)
    constants = {
        "gain": rng.normal(0, 1, 20).astype(F32),
        "shift": rng.normal(0, 1, 20).astype(F32),
        "zero": np.zeros(1, F32),
    }
    ops = [
        Op("binary", ("x", "gain"), ("a",), {"fn": "mul"}),
        Op("binary", ("a", "shift"), ("b",), {"fn": "add"}),
        Op("unary", ("b",), ("c",), {"fn": "clip", "p": -1.0, "q": 1.0}),
        Op("sign", ("c", "zero"), ("y",), {"groups": 1}),
    ]
    program = signed(ops, {"x": TensorType("f32", (50, 20))}, constants)
    done = program
    for _ in range(3):
        done = drop_dead(lower_signs(done))
    last = done.ops[-1]
    assert last.inputs[0] == "x"
    x = {"x": rng.normal(0, 2, (50, 20)).astype(F32)}
    assert np.array_equal(interpret(done, x)["y"], interpret(program, x)["y"])


def test_codes_are_compared_as_they_are():
    ops = [
        Op("dequantize", ("q",), ("a",), {"scale": 0.1, "zero": 119}),
        Op("sign", ("a", "t"), ("y",), {"groups": 2}),
    ]
    constants = {"t": np.array([0.0, 20.0, -0.35, 0.3], F32)}
    program = signed(ops, {"q": TensorType("u8", (256, 4))}, constants)
    done = lower_signs(program)
    assert done.ops[-1].inputs[0] == "q"
    q = {"q": np.repeat(np.arange(256, dtype=np.uint8)[:, None], 4, 1)}
    assert np.array_equal(interpret(done, q)["y"], interpret(program, q)["y"])

"""Scales of few different numbers are stored as bytes, exactly, and files shrink by what that saves."""

import numpy as np
import pytest
import torch
from torch import nn

import pennyweight as pw
from pennyweight.passes.solve import Solve
from pennyweight.plan import Rule
from pennyweight.program.interpret import interpret
from pennyweight.program.ir import Constant, Op, Program, TensorType
from pennyweight.program.rewrite.scales import small_scales
from pennyweight.program.verify import verify
from pennyweight.recipe import Recipe
from pennyweight.runtime.engine import Engine
from pennyweight.runtime.format import read
from pennyweight.runtime.widen import widened
from pennyweight.spec import QuantSpec


def product(scale, zero=None):
    """A linear layer of 8-bit codes [rows, 8 groups] under these scales."""
    rows, groups = scale.shape
    rng = np.random.default_rng(0)
    constants = {
        "w": Constant("i8", rng.integers(-128, 128, (rows, 8 * groups), dtype=np.int8)),
        "s": Constant("f32", scale),
    }
    inputs = ("x", "w", "s")
    if zero is not None:
        constants["z"] = Constant("f32", zero)
        inputs = (*inputs, "z")
    ops = [Op("linear_w", inputs, ("y",), {"bits": 8, "n": 8 * groups}, "layer")]
    return Program({"x": TensorType("f32", (3, 8 * groups))}, ["y"], ops, constants)


def scales_of(program):
    """What `s` has become, decoded."""
    (value,) = [op.inputs[2] for op in program.ops if op.kind == "linear_w"]
    return widened(program).constants[value].data


def stored(program):
    verify(program)
    return {c.dtype: c.data.shape for n, c in program.constants.items() if n not in ("w", "s", "z")}


def test_powers_of_two_take_a_byte_each_under_one_table():
    rng = np.random.default_rng(1)
    scale = np.ldexp(1.0, rng.integers(-127, 128, (40, 24))).astype(np.float32)
    small = small_scales(product(scale))
    assert stored(small)["u8"] == (40, 24)
    (codes,) = [c.data for c in small.constants.values() if c.dtype == "u8"]
    assert np.array_equal(codes.astype(int) - 127, np.log2(scale.astype(np.float64)).astype(int))  # e8m0
    assert np.array_equal(scales_of(small).view(np.uint32), scale.view(np.uint32))
    both = product(scale)
    both.constants["s2"] = Constant("f32", scale[::-1].copy())
    both.ops.append(Op("linear_w", ("x", "w", "s2"), ("y2",), {"bits": 8, "n": 192}, "other"))
    assert sum(c.dtype == "f32" and c.data.size == 256 for c in small_scales(both).constants.values()) == 1


@pytest.mark.parametrize(
    ("different", "dtype"), [(1, "u4"), (16, "u4"), (17, "u8"), (256, "u8"), (257, "f32")]
)
def test_any_numbers_are_told_apart_by_their_bits(different, dtype):
    rng = np.random.default_rng(different)
    numbers = rng.standard_normal(different).astype(np.float32)
    numbers[0] = -0.0 if different > 1 else 0.25
    numbers[-1] = 0.0 if different > 1 else 0.25
    scale = numbers[rng.permutation(np.arange(101 * 33) % different)].reshape(101, 33)
    program = product(scale)
    small = small_scales(program)
    kinds = {c.dtype for n, c in small.constants.items() if n != "w" and c.data.size > 256 and n != "s"}
    assert kinds == (set() if dtype == "f32" else {dtype})
    assert np.array_equal(scales_of(small).view(np.uint32), scale.view(np.uint32))


def test_zero_points_shrink_and_small_tables_stay():
    rng = np.random.default_rng(0)
    scale = rng.uniform(0.5, 1, (60, 10)).astype(np.float32)
    zero = rng.integers(-8, 8, (60, 10)).astype(np.float32)
    small = small_scales(product(scale, zero))
    assert stored(small)["u4"] == (60, 5)
    x = {"x": rng.standard_normal((3, 80)).astype(np.float32)}
    want = interpret(product(scale, zero), x)["y"]
    assert np.array_equal(interpret(small, x)["y"], want)
    tiny = product(scale[:4], zero[:4])
    assert small_scales(tiny) == tiny


@pytest.mark.parametrize(
    ("text", "rule", "bytes_each"),
    [
        ("fp4_e2m1[32]^e8m0", "mx", 1.0),
        ("fp8_e4m3[32]^e8m0", "mx", 1.0),
        ("fp4_e2m1[16]^(fp8_e4m3[*])", "minmax", 1.0),
        ("nf4[64]^(uint8[*])", "minmax", 1.0),
        ("int4[32]^(uint8[*])", "minmax", 1.0),
        ("int4[32]+z", "minmax", 4.5),
    ],
)
def test_files_of_real_layers_shrink_and_mean_the_same(text, rule, bytes_each, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 320), nn.ReLU(), nn.Linear(320, 192)).eval()
    spec = QuantSpec.parse(text)
    x = torch.randn(4, 256)
    recipe = Recipe("small", (Rule(weight=spec),), (Solve("rtn", rule),))
    quantized = pw.quantize(model, [(x,)], recipe, progress=False)
    plain = pw.lower(quantized, (x,), optimized=False)
    program = pw.lower(quantized, (x,))
    (name,) = program.inputs
    (a,), (b,) = interpret(plain, {name: x.numpy()}).values(), interpret(program, {name: x.numpy()}).values()
    assert np.array_equal(a, b)
    count = sum(m.scale.numel() for m in quantized.modules() if hasattr(m, "scale"))
    codes = sum(m.codes.numel() for m in quantized.modules() if hasattr(m, "codes"))
    biases = (320 + 192) * 4
    tables = 3 * 1024 + 16 * 4
    assert program.nbytes <= codes + bytes_each * count + biases + tables + 4
    pw.save(quantized, tmp_path / "m.dwt", example=(x,))
    again = read(tmp_path / "m.dwt")
    assert (tmp_path / "m.dwt").stat().st_size < program.nbytes + 6000
    (c,) = interpret(again, {name: x.numpy()}).values()
    assert np.array_equal(b, c)
    got = Engine(widened(again), threads=1).run({name: x.numpy()})
    np.testing.assert_allclose(next(iter(got.values())), b, atol=2e-5 * float(np.abs(b).max()))

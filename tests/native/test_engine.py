"""The engine against the interpreter: bit for bit, on every instruction set of this machine, with one thread and two."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
import programs
import programs_real
from cases import Case
from programs_decoding import past
from programs_real import follow, half, stored_half
from programs_shifts import level_products

from pennyweight.program.interpret import interpret
from pennyweight.program.ops import definitions
from pennyweight.program.verify import verify
from pennyweight.runtime import library
from pennyweight.runtime.engine import Engine

ISAS = library.supported_isas()
CASES = {c.name: (c, p) for family in (*programs.EXACT, programs_real.conversions) for c, p in family()}
ROUNDED = {c.name: (c, p) for c, p in programs_real.roundings()}
INEXACT = {
    c.name: (c, p)
    for family in (programs.inexact, programs_real.reals, level_products, past)
    for c, p in family()
}


def run(program, inputs, isa, threads):
    engine = Engine(program, threads=threads, isa=isa)
    result = engine.run(inputs)
    again = engine.run(inputs)
    for name, value in result.items():
        assert np.array_equal(*(np.atleast_1d(v).view(np.uint8) for v in (value, again[name]))), (
            f"{name}: a second run differs"
        )
    return result


@pytest.mark.parametrize("name", CASES)
def test_exact(name):
    case, program = CASES[name]
    verify(program)
    assert all(definitions[op.kind].exact for op in program.ops)
    with np.errstate(all="ignore"):
        want = interpret(program, case.inputs)
    for isa in ISAS:
        for threads in (1, 2):
            got = run(program, case.inputs, isa, threads)
            for key, value in want.items():
                assert got[key].dtype == value.dtype and got[key].shape == value.shape, (key, isa)
                same = (got[key] == value) | ((got[key] != got[key]) & (value != value))
                wrong = np.argwhere(~np.atleast_1d(same))
                assert len(wrong) == 0, (
                    f"{isa} x{threads}: {key} differs at {wrong[:3].tolist()} of {len(wrong)}"
                )


@pytest.mark.parametrize("name", INEXACT)
def test_close(name):
    case, program = INEXACT[name]
    verify(program)
    want = interpret(program, case.inputs)
    for isa in ISAS:
        got = run(program, case.inputs, isa, 2)
        for key, value in want.items():
            np.testing.assert_allclose(
                got[key],
                value,
                rtol=2e-5,
                atol=2e-5 * max(1.0, float(np.abs(value).max(initial=0))),
                err_msg=f"{key} {isa}",
            )


@pytest.mark.parametrize("name", ROUNDED)
def test_rounded(name):
    case, program = ROUNDED[name]
    verify(program)
    want = interpret(program, case.inputs)
    for isa in ISAS:
        got = run(program, case.inputs, isa, 2)
        for key, value in want.items():
            largest = float(np.abs(value).max())
            np.testing.assert_allclose(
                got[key], value, rtol=2**-7, atol=2**-8 * largest, err_msg=f"{key} {isa}"
            )
            near = np.isclose(got[key], value, rtol=1e-5, atol=1e-5 * largest)
            assert near.mean() > 0.97, f"{key} {isa}: {1 - near.mean():.3f} rounded otherwise"


@pytest.mark.parametrize("tail", ["", "add", "clip", "add clip"])
def test_products_of_what_is_not_finite(tail):
    """NaN, infinities and denormal numbers of a bias reach a rounded result as they do without vectors."""
    case = Case(f"not finite {tail}")
    bias = case.rng.standard_normal(70).astype(np.float32)
    bias[[3, 20, 37, 69]], bias[[17, 68]], bias[33], bias[50] = np.nan, np.inf, -np.inf, 1e-42
    x, w = half(case, case.floats(30, 40, scale=1)), stored_half(case, 70, 40)
    y = follow(case, case.op("linear_f32", [x, w, case.constant(bias)]), (30, 70), tail)
    program = case.program(case.op("cast", [half(case, y)], dtype="f32"))
    want = Engine(program, threads=1, isa="scalar").run(case.inputs)
    if "clip" not in tail:
        assert np.isnan(want[program.outputs[0]]).sum() == 4 * 30
    for isa in ISAS:
        got = run(program, case.inputs, isa, 1)
        for key, value in want.items():
            np.testing.assert_allclose(got[key], value, rtol=2**-7, atol=2**-8, err_msg=f"{key} {isa}")


def test_every_op_has_a_case():
    reached = {op.kind for _, program in [*CASES.values(), *INEXACT.values()] for op in program.ops}
    assert reached == set(definitions)


def test_every_kernel_runs():
    """Each row of the kernel table that this machine supports is picked by some case at some forced instruction set."""
    seen_kernels = {
        step["kernel"]
        for case, program in [*CASES.values(), *INEXACT.values()]
        for isa in ISAS
        for step in Engine(program, threads=1, isa=isa)
        .plan({n: a.shape for n, a in case.inputs.items()})
        .steps()
    }
    # kernels that work inside the step of another one are seen by what they are part of; those of training and of
    # measuring have no step
    inner = {
        "epilogue",
        "minmax",
        "probabilities",
        "mix",
        "lstm",
        "gru",
        "pack",
        "interleave",
        "decode",
        "max_pool_f32",
        "add_f32",
        "fake_quantize",
        "fake_gradient",
        "peak_i8",
        "peak_f32",
        "peak_bf16",
        "peak_bits",
        "read",
    }
    for op, isa, symbol in library.kernels():
        best = max(
            (i for o, i, _ in library.kernels() if o == op and i in ISAS), key=ISAS.index, default=None
        )
        if isa in ISAS and op not in inner and best is not None:
            assert symbol in seen_kernels, f"no case runs {symbol}"


def test_symbols_bind_to_any_batch():
    case, program = programs.linear_case(6, 24, 40)
    program.inputs["x0"] = type(program.inputs["x0"])("u8", ("batch", 40))
    program.symbols["batch"] = 6
    verify(program)
    engine = Engine(program)
    for rows in (1, 6, 13):
        x = np.resize(case.inputs["x0"], (rows, 40))
        assert np.array_equal(
            engine.run({"x0": x})[program.outputs[0]], interpret(program, {"x0": x})[program.outputs[0]]
        )

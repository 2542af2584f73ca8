"""One engine, many Python threads."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
import programs

from pennyweight.errors import InputError, KernelError
from pennyweight.program.interpret import interpret
from pennyweight.runtime import library
from pennyweight.runtime.engine import Begun, Engine


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_runs_from_many_threads(threads):
    case, program = next(programs.chains())
    engine = Engine(program, threads=threads)
    want = interpret(program, case.inputs)
    wrong = []

    def work():
        for _ in range(20):
            got = engine.run(case.inputs)
            wrong.extend(k for k in want if not np.array_equal(got[k], want[k]))

    workers = [threading.Thread(target=work) for _ in range(6)]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    assert not wrong


def test_an_index_out_of_range_is_an_error():
    case = programs.Case("out of range")
    x = case.floats(4, 3)
    program = case.program(case.op("gather", [x, case.input(np.array([0, 9]))], axis=0))
    engine = Engine(program)
    with pytest.raises(InputError, match="out of range"):
        engine.run(case.inputs)
    case.inputs["x1"] = np.array([0, 3])
    assert engine.run(case.inputs)[program.outputs[0]].shape == (2, 3)


def test_isa_names(monkeypatch):
    assert library.supported_isas()[0] == "scalar"
    with pytest.raises(KernelError, match="altivec"):
        Engine(programs.linear_case(2, 3, 4)[1], isa="altivec")
    monkeypatch.setenv("PENNYWEIGHT_ISA", "scalar")
    assert library.default_isa() == "scalar"
    monkeypatch.setenv("PENNYWEIGHT_ISA", "nonsense")
    with pytest.raises(KernelError, match="nonsense"):
        library.default_isa()


def test_the_table_has_a_scalar_row_for_every_op():
    table = library.kernels()
    assert {op for op, _, _ in table} == {op for op, isa, _ in table if isa == "scalar"}


@pytest.mark.parametrize("threads", [2, 5])
@pytest.mark.parametrize(("case", "program"), list(programs.packings()), ids=lambda v: getattr(v, "name", ""))
@pytest.mark.parametrize("isa", library.supported_isas())
def test_weights_packed_by_many_threads(case, program, isa, threads):
    want = interpret(program, case.inputs)
    got = Engine(program, threads=threads, isa=isa).run(case.inputs)
    assert all(np.array_equal(got[k], want[k]) for k in want)


def test_plans_made_at_the_same_time():
    """One of them gets the pool's help, the others pack alone."""
    made = list(programs.packings()) * 3
    wrong = []

    def work(case, program):
        got, want = Engine(program, threads=2).run(case.inputs), interpret(program, case.inputs)
        wrong.extend(k for k in want if not np.array_equal(got[k], want[k]))

    workers = [threading.Thread(target=work, args=one) for one in made]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    assert not wrong


@pytest.mark.parametrize("expected", [0, 1 << 20, 3 << 20, 8 << 20, 9 << 20, 1 << 40])
@pytest.mark.parametrize(
    ("case", "program"), [*programs.packings(), programs.conv_case((1, 300, 301, 33), 41, (3, 3), pads=1)]
)
def test_memory_that_was_expected(case, program, expected):
    """Too little, enough, too much; runs that take less than what was fetched for them, and more."""
    want = interpret(program, case.inputs)
    engine = Engine(program, threads=2, begun=Begun(expected))
    for _ in range(2):
        got = engine.run(case.inputs)
        assert all(np.array_equal(got[k], want[k]) for k in want)


def test_models_that_were_begun_and_never_read():
    for _ in range(20):
        Begun(4 << 20)

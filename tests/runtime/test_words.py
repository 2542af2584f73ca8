"""Plans in one call: the words say the program, and words that say nonsense are refused, not followed."""

import ctypes as c

import numpy as np
import pytest

from pennyweight.errors import KernelError
from pennyweight.program.ir import Constant, Op, Program, TensorType
from pennyweight.program.verify import infer
from pennyweight.runtime import library
from pennyweight.runtime.engine import Engine
from pennyweight.runtime.widen import widened
from pennyweight.runtime.words import Sentences, constant_words


@pytest.fixture(scope="module")
def native():
    return library.load()


def parts_of(program):
    constants = {name: i for i, name in enumerate(program.constants)}
    return Sentences(program, infer(program), program.symbols, constants).parts()


@pytest.fixture(scope="module")
def program(zoo):
    """As an engine holds it."""
    return widened(zoo)


@pytest.fixture
def begun(zoo, native):
    """A plan of the zoo's model that has been begun, and a way to hand it words."""
    engine = Engine(zoo, threads=1)
    options = library.Options(1, engine.isa_index, 0)
    plans = []

    def make(words, text, reals):
        plan = native.pw_plan_begin(engine.model, c.byref(options))
        plans.append(plan)
        words, reals = np.ascontiguousarray(words), np.ascontiguousarray(reals)
        return native.pw_plan_make(
            plan, words.ctypes.data, words.size, text, len(text), reals.ctypes.data, reals.size
        )

    yield make
    for plan in plans:
        native.pw_plan_free(plan)


def test_integers_of_numpy_are_integers():
    attrs = {"perm": [np.int64(1), 0]}
    program = Program(
        {"x": TensorType("f32", (2, 3))}, ["y"], [Op("transpose", ("x",), ("y",), attrs, "")], {}
    )
    words, _, reals = parts_of(program)
    assert reals.size == 0
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert words.tolist()[-8:-3] == [words.tolist()[-8], 0, 2, 1, 0]  # perm: integers, two: 1, 0
    assert np.array_equal(Engine(program).run({"x": x})["y"], x.T)


def test_written_down():
    ops = [Op("unary", ("x",), ("y",), {"fn": "mul", "p": 2.0, "q": 0.5}, "double")]
    program = Program({"x": TensorType("f32", (2, 3))}, ["y"], ops, {})
    words, text, reals = parts_of(program)
    assert text == b"unary\0double\0fn\0mul\0p\0q\0"
    assert reals.tolist() == [2.0, 0.5]
    assert words.tolist() == [
        0, 1, 0, 0, 2, 2, 3,  # x: an input, the first, f32 of two axes
        0, 0, -1, 0, 2, 2, 3,  # y
        1, 0, 6, 1, 0, 1, 1, 3, 13, 2, 1, 16, 20, 1, 1, 0, 22, 1, 1, 1,  # unary(x) -> y; fn, p, q
        2, 1, 0,
    ]  # fmt: skip


def test_numbers_beyond_64_bits_are_refused():
    ops = [Op("unary", ("x",), ("y",), {"fn": "mul", "p": 2**63, "q": 0}, "far")]
    with pytest.raises(KernelError, match="beyond 64 bits"):
        parts_of(Program({"x": TensorType("f32", (2, 3))}, ["y"], ops, {}))


def test_words_of_constants():
    program = Program(
        {}, [], [], {"a": Constant("i8", np.zeros((4, 5), np.int8)), "b": Constant("f32", np.float32(1))}
    )
    assert constant_words(program).tolist() == [4, 2, 4, 5, 0, 0]


def test_whole_words_are_taken(program, begun):
    assert begun(*parts_of(program)) == 0


def test_words_that_end_early_are_refused(program, begun, native):
    words, text, reals = parts_of(program)
    codes = [begun(words[:n], text, reals) for n in range(0, words.size, 7)]
    assert codes.count(0) < len(codes) / 4  # a cut between two calls is none that could be seen
    assert begun(words[:-1], text, reals) == -1
    assert library.last_error(native) == "the words of a plan end early"


def test_texts_and_reals_out_of_range_are_refused(program, begun, native):
    words, text, reals = parts_of(program)
    assert begun(words, text[:40] + b"\0", reals) == -1
    assert "a text of a plan is out of range" in library.last_error(native)
    assert begun(words, text[:-1], reals) == -1
    assert "do not end" in library.last_error(native)
    assert begun(words, text, reals[:2]) == -1
    assert "a real of a plan is out of range" in library.last_error(native)


def test_nonsense_is_refused(program, begun):
    words, text, reals = parts_of(program)
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(600):
        broken = words.copy()
        for place in rng.integers(0, words.size, rng.integers(1, 4)):
            broken[place] = rng.choice([-1, -(2**63), 2**63 - 1, 2**40, 99, 7, 3, 2**31])
        refused += begun(broken, text, reals) == -1
    assert refused > 300


def test_too_many_or_too_few_words_of_constants(native):
    model = native.pw_model_create()
    try:
        data = np.zeros(20, np.int8)
        places = (c.c_void_p * 2)(data.ctypes.data, data.ctypes.data)
        for words, message in (
            ([4, 2, 4, 5, 4, 1], "end early"), ([4, 1, 20, 4, 1, 20, 4], "more words"), ([77, 1, 1, 4, 1, 1], "dtype"),
            ([4, 9] + [1] * 9 + [4, 0], "rank"), ([4, -1, 4, 0], "end early"),
        ):  # fmt: skip
            given = np.array(words, np.int64)
            assert native.pw_model_constants(model, 2, given.ctypes.data, given.size, places) == -1
            assert message in library.last_error(native)
    finally:
        native.pw_model_free(model)

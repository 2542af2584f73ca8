"""Running: inputs refused in words, results in the shape the model gave them, many threads at once."""

import threading

import numpy as np
import pytest

from pennyweight.errors import InputError, KernelError
from pennyweight.exporters.dwt import write_dwt
from pennyweight.program.interpret import interpret
from pennyweight.program.ir import Op, Program, TensorType
from pennyweight.runtime import Session, library, load


def has_library() -> bool:
    try:
        library.load()
    except (KernelError, OSError, AttributeError):
        return False
    return True


needs_library = pytest.mark.skipif(not has_library(), reason="there is no native library to compare with")
BACKENDS = ["reference", pytest.param("native", marks=needs_library)]


def doubled() -> Program:
    ops = [
        Op("unary", ("x",), ("y",), {"fn": "mul", "p": 2.0, "q": 0.0}, "double"),
        Op("binary", ("x", "x"), ("z",), {"fn": "add"}, "sum"),
    ]
    return Program(
        {"x": TensorType("f32", ("batch", 3))}, ["y", "z"], ops, {}, {"batch": 2}, {"a": 0, "b": [1, None]}
    )


@pytest.fixture(params=BACKENDS)
def session(request):
    return Session(doubled(), backend=request.param)


X = np.arange(6, dtype=np.float32).reshape(2, 3)


def test_result_is_nested_as_the_model_said(session):
    result = session.run(X)
    assert set(result) == {"a", "b"}
    assert np.array_equal(result["a"], 2 * X)
    assert result["b"][1] is None
    assert np.array_equal(result["b"][0], 2 * X)


@pytest.mark.parametrize("tree", [0, [0], [1, 0], {"only": 1}, [[0, {"x": 1}], None]])
def test_trees(tree):
    program = doubled()
    program.tree = tree
    result = Session(program, backend="reference").run(X)

    def check(t, r):
        if isinstance(t, dict):
            assert set(t) == set(r)
            for k in t:
                check(t[k], r[k])
        elif isinstance(t, list):
            assert len(t) == len(r)
            for a, b in zip(t, r, strict=True):
                check(a, b)
        elif t is None:
            assert r is None
        else:
            assert np.array_equal(r, 2 * X)

    check(tree, result)


def test_ways_to_pass_inputs(session):
    expected = session.run(X)["a"]
    assert np.array_equal(session.run({"x": X})["a"], expected)
    assert np.array_equal(session(X)["a"], expected)
    assert np.array_equal(session.run(X.tolist() and np.asfortranarray(X))["a"], expected)
    assert np.array_equal(session.run(np.repeat(X, 2, 1)[:, ::2])["a"], expected)


def test_misaligned_inputs(session):
    raw = np.zeros(X.nbytes + 1, np.uint8)
    shifted = raw[1:].view(np.float32).reshape(2, 3)
    shifted[:] = X
    assert not shifted.flags.aligned
    assert np.array_equal(session.run(shifted)["a"], 2 * X)


@pytest.mark.parametrize("batch", [1, 2, 5, 0])
def test_any_batch(session, batch):
    x = np.ones((batch, 3), np.float32)
    assert session.run(x)["a"].shape == (batch, 3)


@pytest.mark.parametrize(
    ("inputs", "what"),
    [
        ((), "0 arrays for 1 inputs.*x: float32"),
        ((X, X), "2 arrays for 1 inputs"),
        (({"y": X},), "no input 'y'.*inputs: x"),
        (({},), "input 'x' is missing"),
        (({"x": X, "xx": X},), "no input 'xx'.*Did you mean 'x'"),
        ((X.astype(np.float64),), r"'x' is float64, not float32.*x.astype\(np.float32\)"),
        ((X.astype(np.int32),), "'x' is int32, not float32"),
        ((X.astype(">f4"),), "'x' is >f4, not float32"),
        (([[1, 2, 3]],), "'x' is int64, not float32"),
        ((None,), "'x' is object"),
        ((X[0],), "'x' has the wrong rank"),
        ((X[None],), "'x' has the wrong rank"),
        ((X[:, :2],), "'x' has the wrong shape"),
    ],
)
def test_bad_inputs(session, inputs, what):
    with pytest.raises(InputError, match=what):
        session.run(*inputs)


def test_sizes_that_contradict_each_other():
    inputs = {"a": TensorType("f32", ("batch",)), "b": TensorType("f32", ("batch",))}
    program = Program(inputs, ["y"], [Op("binary", ("a", "b"), ("y",), {"fn": "add"})], {}, {"batch": 2})
    with pytest.raises(InputError, match="size 'batch' is 2 in one place and 3 in another"):
        Session(program, backend="reference").run(np.zeros(2, np.float32), np.zeros(3, np.float32))


def test_sizes_that_the_program_was_not_made_for():
    ops = [Op("reshape", ("x",), ("y",), {"shape": ["batch // 2", 2]}, "pairs")]
    session = Session(
        Program({"x": TensorType("f32", ("batch",))}, ["y"], ops, {}, {"batch": 4}), backend="reference"
    )
    assert session.run(np.zeros(6, np.float32)).shape == (3, 2)
    with pytest.raises(InputError, match=r"does not take inputs of these sizes.*pairs.*x \(5,\).*batch = 4"):
        session.run(np.zeros(5, np.float32))


def test_index_out_of_range(zoo, zoo_inputs):
    session = Session(zoo, backend="reference")
    zoo_inputs["ids"][1] = 6
    with pytest.raises(InputError, match="index 6 is out of range for an axis of 6"):
        session.run(zoo_inputs)


def test_ports(zoo):
    session = Session(doubled(), backend="reference")
    assert [str(p) for p in session.inputs] == ["x: float32[batch, 3]"]
    assert [str(p) for p in session.outputs] == ["y: float32[batch, 3]", "z: float32[batch, 3]"]
    shapes = {p.shape for p in Session(zoo, backend="reference").outputs}
    assert ("?",) in shapes  # a size computed from a symbol
    assert ("length",) in shapes
    assert "Session(x: float32" in repr(session)


def test_backends():
    with pytest.raises(KernelError, match=r"no backend 'natve'.*Did you mean 'native'"):
        Session(doubled(), backend="natve")
    session = Session(doubled())
    assert session.backend == ("native" if has_library() else "reference")
    assert session.note
    assert Session(doubled(), backend="reference").note == "asked for"


def test_without_the_library(monkeypatch):
    def missing():
        raise KernelError("libpennyweight is not installed")

    monkeypatch.setattr(library, "load", missing)
    session = Session(doubled())
    assert session.backend == "reference"
    assert "not available: libpennyweight is not installed" in session.note
    with pytest.raises(KernelError, match="not installed"):
        Session(doubled(), backend="native")


def test_load(zoo, zoo_inputs, tmp_path):
    write_dwt(zoo, tmp_path / "a.dwt")
    session = load(tmp_path / "a.dwt", backend="reference")
    expected = interpret(zoo, zoo_inputs)
    result = session.run(zoo_inputs)
    assert np.array_equal(result["first"], expected[zoo.outputs[0]])
    assert result["rest"][-1] is None
    assert len(result["rest"]) == len(zoo.outputs)


@needs_library
def test_native_equals_reference(zoo, zoo_inputs):
    expected, got = (Session(zoo, backend=b).run(zoo_inputs) for b in ("reference", "native"))
    leaves = lambda r: [r["first"], *r["rest"][:-1]]  # noqa: E731
    for name, a, b in zip(zoo.outputs, leaves(expected), leaves(got), strict=True):
        assert a.dtype == b.dtype, name
        kept = b[np.isfinite(b)] if b.dtype.kind == "f" else b
        largest = float(np.abs(kept).max(initial=1))  # what cancels leaves rounding of its size
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6 * largest, err_msg=name)


def test_profile(session):
    rows = session.profile(X)
    assert {"op", "site", "kernel", "ns"} <= set(rows[0])
    assert all(row["ns"] >= 0 for row in rows)


def test_many_threads(session):
    wrong = []

    def work(seed):
        rng = np.random.default_rng(seed)
        for _ in range(50):
            x = rng.standard_normal((int(rng.integers(1, 9)), 3), dtype=np.float32)
            if not np.array_equal(session.run(x)["a"], 2 * x):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_memory_of_sizes_stays_bounded():
    session = Session(doubled(), backend="reference")
    for batch in range(1, 4200):
        session.checked((np.zeros((batch, 3), np.float32),))
    assert len(session._fits) <= 4097

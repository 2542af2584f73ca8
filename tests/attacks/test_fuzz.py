"""Seeded random damage. Whatever the bytes, reading gives a program or a FormatError, and running one never crashes."""

import json
import random
import warnings

import numpy as np
import pytest

from pennyweight.errors import FormatError, KernelError, PennyweightError
from pennyweight.runtime import Session, library, read

JUNK = [
    None, True, False, 0, 1, -1, 2, 3, 255, 256, 2**31, 2**63, -(2**70), 1.5, -0.0, 1e300, "", "x", "batch",
    "length * 2", "ids", "batch // 0", "9" * 400, "(" * 300, "\x00", "u4", "f32", "F64", [], [0], [1, 1], [[]],
    {}, {"a": 1}, {"float": "inf"}, {"float": "nan"}, {"float": []}, "q", "conv", "fc.scale", [1] * 40,
]  # fmt: skip


def survives(path, raw, backend="reference") -> str:
    """Read, and run what can be read; returns what happened."""
    path.write_bytes(raw)
    try:
        program = read(path)
    except FormatError as error:
        return "refused" if str(path) in str(error) else "refused without naming the file"
    rng = np.random.default_rng(0)
    inputs = {}
    for name, kind in program.inputs.items():
        shape = [program.symbols.get(d, d) for d in kind.shape]
        if np.prod(shape, dtype=float) > 1e5:
            return "large"
        inputs[name] = {
            "f32": lambda s=shape: rng.standard_normal(s, dtype=np.float32),
            "i64": lambda s=shape: rng.integers(0, 3, s),
        }.get(kind.dtype, lambda: None)()
    if any(v is None for v in inputs.values()):
        return "other"
    try:
        session = Session(program, backend=backend, threads=1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # damaged constants may well overflow in float arithmetic
            session.run(inputs)
    except PennyweightError:
        return "stopped"
    return "ran"


def places(value, path=()):
    """Paths of all nodes of a JSON value."""
    yield path
    children = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    for key, child in children:
        yield from places(child, (*path, key))


def replaced(value, path, new):
    """A copy of a JSON value with one node replaced."""
    copy = json.loads(json.dumps(value))
    if not path:
        return new
    node = copy
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = new
    return copy


def check_outcomes(outcomes):
    """The damage must have been real, and some of it harmless: otherwise the test tests nothing."""
    assert outcomes.count("refused") > len(outcomes) // 20
    return outcomes


def test_the_good_file_runs(good, tmp_path):
    assert survives(tmp_path / "good.dwt", good) == "ran"


def test_flipped_bytes(good, tmp_path):
    rng = random.Random(20261120)
    outcomes = []
    for _ in range(1500):
        raw = bytearray(good)
        for _ in range(rng.randint(1, 3)):
            raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        outcomes.append(survives(tmp_path / "a.dwt", bytes(raw)))
    assert set(outcomes) <= {"refused", "ran"}
    assert outcomes.count("ran") <= 3  # two flips of the same bit undo each other; nothing else may pass


def test_flipped_bytes_signed_again(crafted, tmp_path):
    rng = random.Random(1)
    outcomes = []
    for _ in range(800):
        file = crafted()
        text = bytearray(json.dumps(file.program).encode())
        for _ in range(rng.randint(1, 2)):
            text[rng.randrange(len(text))] ^= 1 << rng.randrange(8)
        file.data[rng.randrange(len(file.data))] ^= 1 << rng.randrange(8)
        outcomes.append(survives(tmp_path / "a.dwt", file.bytes(text=text.decode("latin1"))))
    check_outcomes(outcomes)
    assert "ran" in outcomes


def test_junk_in_the_program(crafted, tmp_path):
    rng = random.Random(2)
    outcomes = []
    everywhere = list(places(crafted().program))
    for _ in range(2500):
        file = crafted()
        file.program = replaced(file.program, rng.choice(everywhere), rng.choice(JUNK))
        outcomes.append(survives(tmp_path / "a.dwt", file.bytes()))
    check_outcomes(outcomes)
    assert "ran" in outcomes


def test_junk_in_the_header(crafted, tmp_path):
    rng = random.Random(3)
    outcomes = []
    header = crafted().header
    everywhere = [p for p in places(header) if p and p[0] != "__metadata__"]
    for _ in range(1000):
        file = crafted()
        file.header = replaced(header, rng.choice(everywhere), rng.choice(JUNK))
        outcomes.append(survives(tmp_path / "a.dwt", file.bytes()))
    check_outcomes(outcomes)


def test_junk_on_the_engine(crafted, tmp_path):
    """What the checks let through must not crash native code either."""
    try:
        library.load()
    except KernelError as error:
        pytest.skip(f"there is no native library to attack: {error}")
    rng = random.Random(5)
    outcomes = []
    everywhere = list(places(crafted().program))
    for _ in range(1500):
        file = crafted()
        file.program = replaced(file.program, rng.choice(everywhere), rng.choice(JUNK))
        file.data[rng.randrange(len(file.data))] ^= 1 << rng.randrange(8)
        outcomes.append(survives(tmp_path / "a.dwt", file.bytes(), "native"))
    check_outcomes(outcomes)
    assert "ran" in outcomes


def nudged(program, rng, names):
    """Change one value a little, in place: what types cannot see."""
    path = rng.choice([p for p in places(program) if p])
    node = program
    for key in path[:-1]:
        node = node[key]
    old = node[path[-1]]
    if type(old) is bool:
        node[path[-1]] = not old
    elif type(old) is int:
        node[path[-1]] = rng.choice([old + 1, old - 1, old * 2, 0, 1, 2, 3, 7])
    elif type(old) is float:
        node[path[-1]] = rng.choice([old * 2, -old, 0.0, old * 1e-6, old * 1e6])
    elif old in names:
        node[path[-1]] = rng.choice(names)
    elif type(old) is list and old:
        node[path[-1]] = rng.choice([old[:-1], [*old, old[-1]], old[::-1]])


def differential(crafted, path, seed, count, backend):
    """Nudge programs; those that can be read must give on `backend` what the reference gives, errors included."""
    rng = random.Random(seed)
    ran = 0
    program = crafted().program
    names = sorted({n for op in program["ops"] for n in op[1] + op[2] if n})
    for _ in range(count):
        file = crafted()
        for _ in range(rng.randint(1, 2)):
            nudged(file.program, rng, names)
        path.write_bytes(file.bytes())
        try:
            found = read(path)
        except FormatError:
            continue
        numbers = np.random.default_rng(0)
        inputs = {}
        for name, kind in found.inputs.items():
            shape = [found.symbols.get(d, d) for d in kind.shape]
            floats = kind.dtype == "f32"
            inputs[name] = (
                numbers.standard_normal(shape, dtype=np.float32) if floats else numbers.integers(0, 3, shape)
            )
        expected, got = (outcome(found, inputs, b) for b in ("reference", backend))
        assert type(expected) is type(got), (path, expected, got)
        if isinstance(expected, dict):
            ran += 1
            for name in found.outputs:
                np.testing.assert_allclose(got[name], expected[name], rtol=1e-4, atol=1e-4, err_msg=name)
    return ran


def outcome(program, inputs, backend):
    """Outputs by name, or the error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return Session(program, backend=backend, threads=1).engine.run(inputs)
        except PennyweightError as error:
            return error


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_nudged_programs(crafted, tmp_path, backend):
    if backend == "native":
        try:
            library.load()
        except KernelError as error:
            pytest.skip(f"there is no native library to compare with: {error}")
    assert differential(crafted, tmp_path / "a.dwt", 6, 500, backend) > 100


@pytest.mark.slow
def test_much_junk(crafted, tmp_path):
    rng = random.Random(4)
    outcomes = []
    everywhere = list(places(crafted().program))
    for _ in range(20_000):
        file = crafted()
        for _ in range(rng.randint(1, 3)):
            try:
                file.program = replaced(file.program, rng.choice(everywhere), rng.choice(JUNK))
            except (KeyError, IndexError, TypeError):
                continue  # the place is gone after the first replacement
        outcomes.append(survives(tmp_path / "a.dwt", file.bytes()))
    check_outcomes(outcomes)

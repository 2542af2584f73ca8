"""Writing and reading .dwt files: nothing changes, nothing is copied, other tools can read them, torch stays out."""

import subprocess
import sys

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from pennyweight.errors import FormatError
from pennyweight.exporters.dwt import write_container, write_dwt
from pennyweight.program.bounds import ATTRIBUTES
from pennyweight.program.interpret import interpret
from pennyweight.program.ir import DTYPES, SIZE_ATTRS, Constant, Op, Program, TensorType
from pennyweight.program.ops import definitions
from pennyweight.runtime import read
from pennyweight.runtime.container import read_container
from pennyweight.runtime.format import STORED


@pytest.fixture
def path(zoo, tmp_path):
    target = tmp_path / "zoo.dwt"
    write_dwt(zoo, target)
    return target


ANYWHERE = [d for d in DTYPES if d != "i16"]  # weights of products alone have 16 bits; the zoo has one


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def test_the_zoo_has_every_op_and_dtype(zoo):
    assert {op.kind for op in zoo.ops} == set(definitions)
    assert {c.dtype for c in zoo.constants.values()} == set(DTYPES) == set(STORED)


def test_every_attribute_has_a_rule():
    assert {a for d in definitions.values() for a in d.attrs} <= set(ATTRIBUTES)
    assert set(ATTRIBUTES) >= set(SIZE_ATTRS)


def test_round_trip_changes_nothing(zoo, path, zoo_inputs):
    back = read(path)
    assert str(back) == str(zoo)
    assert (back.inputs, back.outputs, back.symbols, back.tree) == (
        zoo.inputs,
        zoo.outputs,
        zoo.symbols,
        zoo.tree,
    )
    assert back.meta == zoo.meta
    assert [op.attrs for op in back.ops] == [op.attrs for op in zoo.ops]
    for name, constant in zoo.constants.items():
        assert back.constants[name].dtype == constant.dtype
        assert same(back.constants[name].data, constant.data)
    before, after = interpret(zoo, zoo_inputs), interpret(back, zoo_inputs)
    assert all(same(before[n], after[n]) for n in zoo.outputs)


def test_same_program_same_bytes(zoo, path, tmp_path):
    write_dwt(zoo, tmp_path / "again.dwt")
    assert (tmp_path / "again.dwt").read_bytes() == path.read_bytes()
    write_dwt(read(path), tmp_path / "copy.dwt")
    once = read_container(path)
    copy = read_container(tmp_path / "copy.dwt")
    assert once.metadata == copy.metadata


def test_constants_are_views_of_the_file(path):
    for constant in read(path).constants.values():
        assert not constant.data.flags.owndata
        assert not constant.data.flags.writeable
        assert constant.data.flags.aligned


def test_data_begin_at_a_multiple_of_64(path):
    length = int.from_bytes(path.read_bytes()[:8], "little")
    assert (8 + length) % 64 == 0


def test_the_safetensors_library_reads_it(zoo, path):
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == set(zoo.constants)
        assert file.metadata()["pennyweight.format"] == "2"
        for name, constant in zoo.constants.items():
            assert list(file.get_tensor(name).shape) == list(constant.data.shape)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (7,), (2, 3, 5)])
@pytest.mark.parametrize("dtype", ANYWHERE)
def test_shapes_and_dtypes(tmp_path, shape, dtype):
    held = np.dtype(DTYPES[dtype][0])
    data = (np.arange(int(np.prod(shape))) % 2).astype(held).reshape(shape)
    program = Program({}, ["c"], [], {"c": Constant(dtype, data)})
    write_dwt(program, tmp_path / "a.dwt")
    back = read(tmp_path / "a.dwt").constants["c"]
    assert back.dtype == dtype
    assert same(back.data, data)


def test_odd_sizes_stay_aligned(tmp_path):
    rng = np.random.default_rng(3)
    constants = {}
    for i, (dtype, (held, _)) in enumerate((d, DTYPES[d]) for d in ANYWHERE):
        for n in (1, 3, 5):
            constants[f"{dtype}.{i}.{n}"] = Constant(dtype, rng.integers(0, 2, n).astype(held))
    write_dwt(Program({}, list(constants), [], constants), tmp_path / "a.dwt")
    back = read(tmp_path / "a.dwt").constants
    assert all(same(back[n].data, c.data) for n, c in constants.items())
    assert all(c.data.flags.aligned for c in back.values())


def test_non_contiguous_constants(tmp_path):
    data = np.arange(12, dtype=np.float32).reshape(3, 4).T
    write_dwt(Program({}, ["c"], [], {"c": Constant("f32", data)}), tmp_path / "a.dwt")
    assert np.array_equal(read(tmp_path / "a.dwt").constants["c"].data, data)


def test_infinite_and_float_attributes_survive(tmp_path):
    attrs = {"fn": "clip", "p": float("-inf"), "q": float(np.float32(0.1))}
    program = Program({"x": TensorType("f32", (2,))}, ["y"], [Op("unary", ("x",), ("y",), attrs, "a")], {})
    write_dwt(program, tmp_path / "a.dwt")
    assert read(tmp_path / "a.dwt").ops[0].attrs == attrs


def test_unicode_names_survive(tmp_path):
    program = Program({"größe": TensorType("f32", (2,))}, ["größe"], [], {}, meta={"who": "Gödel \U0001f600"})
    write_dwt(program, tmp_path / "a.dwt")
    assert read(tmp_path / "a.dwt").meta == {"who": "Gödel \U0001f600"}
    assert "größe" in read(tmp_path / "a.dwt").inputs


def test_other_safetensors_files_are_named_as_such(tmp_path):
    save_file({"a": np.zeros(3, np.float32)}, tmp_path / "a.safetensors", {"format": "pt"})
    with pytest.raises(FormatError, match="no checksum"):
        read(tmp_path / "a.safetensors")
    write_container(tmp_path / "b.dwt", {}, {"a": "b"})
    with pytest.raises(FormatError, match=r"no \.dwt model"):
        read(tmp_path / "b.dwt")


def test_reading_and_running_never_imports_torch(path):
    code = (
        "import sys, numpy as np, pennyweight, pennyweight.runtime as r\n"
        f"s = r.load({str(path)!r}, backend='reference')\n"
        "s.run({'x': np.zeros((2, 3, 4, 4), 'f'), 'ids': np.zeros(3, 'i8')})\n"
        "assert dir(pennyweight) and repr(s) and s.outputs\n"
        "bad = {'torch', 'safetensors', 'rich', 'typer', 'scipy', 'pandas'} & set(sys.modules)\n"
        "assert not bad, bad\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

"""Writing: whole or not at all, and never what could not be read."""

import os

import numpy as np
import pytest

from pennyweight.atomic import atomic_write
from pennyweight.errors import FormatError, VerifyError
from pennyweight.exporters import exporters
from pennyweight.exporters.dwt import write_container, write_dwt
from pennyweight.program.ir import Constant, Op, Program, TensorType
from pennyweight.runtime import read
from pennyweight.runtime.container import read_container


def leftovers(folder):
    return sorted(p.name for p in folder.iterdir())


def test_registered(zoo, tmp_path):
    assert "dwt" in exporters
    size = exporters["dwt"](zoo, tmp_path / "a.dwt")
    assert size == (tmp_path / "a.dwt").stat().st_size


def stop_halfway(path, error):
    with atomic_write(path) as file:
        file.write(b"half")
        raise error


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_interrupted_writing_leaves_nothing(tmp_path, error):
    with pytest.raises(error):
        stop_halfway(tmp_path / "a.dwt", error)
    assert leftovers(tmp_path) == []


def test_interrupted_writing_keeps_what_was_there(tmp_path):
    target = tmp_path / "a.dwt"
    target.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt):
        stop_halfway(target, KeyboardInterrupt)
    assert target.read_bytes() == b"old"
    assert leftovers(tmp_path) == ["a.dwt"]


def test_failing_disk(zoo, tmp_path, monkeypatch):
    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_dwt(zoo, tmp_path / "a.dwt")
    assert leftovers(tmp_path) == []


def test_missing_folder(zoo, tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        write_dwt(zoo, tmp_path / "nowhere" / "a.dwt")


def test_replacing_keeps_open_sessions_alive(zoo, tmp_path):
    path = tmp_path / "a.dwt"
    write_dwt(zoo, path)
    before = read(path)
    copy = {n: c.data.copy() for n, c in before.constants.items()}
    write_dwt(Program({}, ["c"], [], {"c": Constant("f32", np.zeros(3, np.float32))}), path)
    assert all(np.array_equal(before.constants[n].data, data, equal_nan=True) for n, data in copy.items())
    assert len(read(path).constants) == 1


@pytest.mark.parametrize(
    ("attrs", "what"),
    [
        ({"scale": float("nan"), "zero": 0, "lo": 0, "hi": 255}, "quantize.scale"),
        ({"scale": np.float32(0.5), "zero": 0, "lo": 0, "hi": 255}, "quantize.scale"),
        ({"scale": 0.5, "zero": np.int64(3), "lo": 0, "hi": 255}, "quantize.zero"),
        ({"scale": 0.5, "zero": 0, "lo": 9, "hi": 3}, "clamps"),
    ],
)
def test_bad_programs_are_not_written(tmp_path, attrs, what):
    program = Program({"x": TensorType("f32", (2,))}, ["q"], [Op("quantize", ("x",), ("q",), attrs, "a")], {})
    with pytest.raises(VerifyError, match=what):
        write_dwt(program, tmp_path / "a.dwt")
    assert leftovers(tmp_path) == []


def test_meta_that_is_no_json(tmp_path):
    program = Program({}, ["c"], [], {"c": Constant("f32", np.zeros(3, np.float32))}, meta={"a": object()})
    with pytest.raises(VerifyError, match="no JSON form"):
        write_dwt(program, tmp_path / "a.dwt")


def test_container_refuses_wrongly_held_tensors(tmp_path):
    with pytest.raises(FormatError, match="held as float64"):
        write_container(tmp_path / "a", {"a": ("F32", np.zeros(3))}, {})


def test_container_refuses_reserved_names(tmp_path):
    with pytest.raises(FormatError, match="reserved"):
        write_container(tmp_path / "a", {"__metadata__": ("F32", np.zeros(3, np.float32))}, {})


def test_container_round_trip(tmp_path):
    tensors = {
        "a": ("F64", np.arange(3.0)),
        "b": ("BOOL", np.array([True, False])),
        "c": ("I16", np.array([[-5]], np.int16)),
        "empty": ("F32", np.zeros((0, 4), np.float32)),
        "scalar": ("I64", np.array(7)),
    }
    write_container(tmp_path / "a", tensors, {"who": "me"})
    found = read_container(tmp_path / "a")
    assert found.metadata == {"who": "me"}
    for name, (dtype, array) in tensors.items():
        assert found.tensors[name][0] == dtype
        assert np.array_equal(found.tensors[name][1], array)
        assert found.tensors[name][1].shape == array.shape

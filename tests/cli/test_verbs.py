"""`run`, `bench`, `inspect`, `list` and `doctor`: tables for people, the same values as JSON."""

import json

import numpy as np
import pytest
import torch

import pennyweight as pw
from pennyweight.cli.listing import KINDS
from pennyweight.exporters.dwt import write_dwt
from pennyweight.program.ops import definitions


def test_run(run, run_json, model_file):
    result = run_json("run", model_file, "--input", "x.npy", "-o", "y.npy")
    expected = pw.load(model_file).run(np.load("x.npy"))
    assert np.array_equal(np.load("y.npy"), expected)
    assert result["results"][0]["shape"] == [5, 4]
    code, out, _ = run("run", model_file, "-i", "input=x.npy", "-o", "z.npz")
    assert code == 0
    assert "float32" in out
    assert np.array_equal(np.load("z.npz")["result"], expected)
    np.savez("x.npz", input=np.load("x.npy"))
    assert run_json("run", model_file, "-i", "x.npz", "--backend", "reference")["backend"] == "reference"


def test_run_several_results(run_json, zoo, zoo_inputs, folder):
    write_dwt(zoo, "zoo.dwt")
    np.savez("in.npz", **zoo_inputs)
    result = run_json("run", "zoo.dwt", "-i", "in.npz", "-o", "out.npz", "--backend", "reference")
    assert len(result["results"]) == len(zoo.outputs)
    names = set(np.load("out.npz").files)
    assert {"first", "rest.0"} <= names


@pytest.mark.parametrize(
    ("arguments", "code", "what"),
    [
        (["-i", "nothing.npy"], 4, "no file 'nothing.npy'"),
        (["-i", "usernets.py"], 3, "suffix '.py' is not numpy's"),
        (["-i", "y=x.npy"], 3, "no input 'y'"),
        (["-i", "x.npy", "-i", "input=x.npy"], 3, "some inputs have names"),
        (["-i", "x.npy", "-i", "x.npy"], 3, "2 arrays for 1 inputs"),
        (["-i", "double.npy"], 3, "float64, not float32"),
        (["-i", "flat.npy"], 3, "wrong rank"),
        (["-i", "x.npy", "-o", "y.txt"], 3, "suffix is unknown"),
        (["-i", "x.npy", "--backend", "gpu"], 3, "no backend 'gpu'"),
        (["-i", "x.npy", "-o", "no/y.npy"], 4, "no folder"),
    ],
)
def test_run_refusals(run, model_file, arguments, code, what):
    np.save("double.npy", np.load("x.npy").astype(np.float64))
    np.save("flat.npy", np.load("x.npy").reshape(-1))
    got, _, err = run("run", model_file, *arguments)
    assert got == code
    assert what in err


@pytest.mark.parametrize("damage", ["truncated", "altered", "empty", "text"])
def test_damaged_files(run, model_file, folder, damage):
    path = folder / model_file
    raw = bytearray(path.read_bytes())
    if damage == "altered":
        raw[len(raw) // 2] ^= 1
    path.write_bytes(
        {"truncated": raw[:-10], "altered": raw, "empty": b"", "text": b"hello world " * 30}[damage]
    )
    for verb in (["run", model_file, "-i", "x.npy"], ["inspect", model_file], ["bench", model_file]):
        code, _, err = run(*verb)
        assert code == 3
        assert err.startswith("error: ")
        assert model_file in err


def test_inspect(run, run_json, model_file):
    result = run_json("inspect", model_file)
    assert result["inputs"] == ["input: float32[batch, 3, 8, 8]"]
    assert result["bytes"] > result["constant_bytes"] > 0
    assert {"op": "conv", "count": 1} in result["ops"]
    assert 'name = "int8"' in result["recipe"]
    assert len(result["program"]) == sum(row["count"] for row in result["ops"])
    code, out, _ = run("inspect", model_file, "--program", "--constants", "--journal")
    assert code == 0
    for word in ("conv", "0.codes", "uint8[*]+z", "int8n[1,*]", "lowered"):
        assert word in out


@pytest.mark.parametrize("kind", KINDS)
def test_list(run_json, kind):
    rows = run_json("list", kind)[kind]
    assert rows
    assert all("name" in row or "op" in row for row in rows)


def test_list_has_everything(run, run_json):
    everything = run_json("list")
    assert set(everything) == set(KINDS)
    assert {row["name"] for row in everything["ops"]} == set(definitions)
    assert {row["name"] for row in everything["recipes"]} == set(pw.presets())
    assert "dwt" in {row["name"] for row in everything["exporters"]}
    code, out, _ = run("list", "grids")
    assert code == 0
    assert "int8" in out


def test_doctor(run, run_json):
    result = run_json("doctor")
    assert result["pennyweight"] == pw.__version__
    assert result["packages"]["torch"] == torch.__version__
    assert result["native"]["backend"] in ("native", "reference")
    if result["native"]["backend"] == "native":
        assert sum(row["picked"] for row in result["native"]["isas"]) == 1
    code, out, _ = run("doctor")
    assert code == 0
    assert "backend" in out


def test_doctor_measures_and_remembers(run, run_json, folder, monkeypatch):
    monkeypatch.setenv("PENNYWEIGHT_CACHE", str(folder / "cache"))
    assert "not measured" in run_json("doctor")["peaks"]["note"]
    measured = run_json("doctor", "--calibrate", "--seconds", 0.01)["peaks"]
    assert measured["values"]["macs"]["int8 scalar"]["1"] > 0
    assert run_json("doctor")["peaks"] == measured
    code, out, _ = run("doctor")
    assert code == 0
    assert "int8 scalar products" in out
    next((folder / "cache").iterdir()).write_text("{")
    assert "calibrate" in run_json("doctor")["peaks"]["note"]


def test_doctor_without_a_library(run_json, monkeypatch):
    from pennyweight.errors import KernelError
    from pennyweight.runtime import library

    def missing():
        raise KernelError("libpennyweight is not installed")

    monkeypatch.setattr(library, "load", missing)
    result = run_json("doctor")
    assert result["native"]["backend"] == "reference"
    assert "not installed" in result["native"]["library"]
    assert "not installed" in run_json("list", "kernels")["kernels"][0]["symbol"]


def test_bench_file_against_model(run, run_json, model_file):
    arguments = [
        "bench",
        model_file,
        "--model",
        "usernets:net",
        "--batch",
        "1,2",
        "--threads",
        1,
        "--seconds",
        0.05,
    ]
    result = run_json(*arguments, "--no-memory", "--layers")
    assert [row["batch"] for row in result["rows"]] == [1, 2]
    for row in result["rows"]:
        assert row["p50_ms"] > 0
        assert row["p95_ms"] >= row["p50_ms"]
        assert row["float_p50_ms"] > 0
        assert row["speedup"] > 0
        assert row["per_second"] == pytest.approx(row["batch"] / row["p50_ms"] * 1e3)
    assert {found["batch"] for found in result["layers"]} == {1, 2}
    for found in result["layers"]:
        assert found["float_wall_ns"] > 0
        assert {"0", "5"} <= {layer["site"] for layer in found["layers"]}
        assert all(layer["kernel"] and layer["ns"] > 0 for layer in found["layers"])
    assert result["load_ms"] > 0
    code, out, _ = run(*arguments, "--no-memory")
    assert code == 0
    assert "speedup" in out


def test_bench_file_alone_measures_memory_without_torch(run_json, model_file):
    result = run_json("bench", model_file, "--seconds", 0.05, "--threads", 1)
    assert 5e6 < result["peak_bytes"] < 250e6  # torch alone takes more
    assert "float_peak_bytes" not in result
    assert "speedup" not in result["rows"][0]


def test_bench_model(run, folder):
    code, out, err = run("bench", "usernets:net", "--seconds", 0.05, "--threads", 1, "--no-memory", "--json")
    assert code == 0, err
    assert "fit for timing, not for accuracy" in err
    assert json.loads(out)["rows"][0]["speedup"] > 0
    code, _, err = run("bench", "usernets:bare", "--seconds", 0.05)
    assert code == 3
    assert "brings no example" in err


@pytest.mark.slow
def test_bench_memory_of_both(run_json, model_file):
    result = run_json("bench", model_file, "--model", "usernets:net", "--seconds", 0.05, "--threads", 1)
    assert result["float_peak_bytes"] > 2 * result["peak_bytes"]

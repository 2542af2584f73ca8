"""`pennyweight quantize`: every form of MODEL and DATA, and what is refused."""

import importlib
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import pennyweight as pw
from pennyweight.cli.data import ImageOptions, read_image


def user_module(folder):
    """The user's module, as the command found it."""
    sys.path.insert(0, str(folder))
    return importlib.import_module("usernets")


def test_reference_and_function(run_json):
    result = run_json("quantize", "usernets:net", "--calib", "usernets:batches", "-o", "a.dwt")
    assert result["bytes"] < result["float_bytes"] or result["float_bytes"] < 10_000
    assert result["sites"] > 3
    assert result["kept"] == []
    assert result["difference"]["max_abs"] == 0
    session = pw.load("a.dwt")
    assert session.run(np.zeros((3, 3, 8, 8), np.float32)).shape == (3, 4)


def test_table(run):
    code, out, _ = run(
        "quantize", "usernets:net", "--calib", "usernets:batches", "-o", "a.dwt", "--keep", "5"
    )
    assert code == 0
    assert "smaller" in out
    assert "kept in float" in out
    assert "rule '5'" in out


def test_arrays(run_json, folder):
    result = run_json(
        "quantize", "usernets:bare", "--calib", "x.npy", "--batch", 2, "--limit", 3, "-o", "a.dwt"
    )
    assert result["sites"] > 3
    np.savez("x.npz", x=np.load("x.npy").astype(np.float64))
    assert (
        run_json("quantize", "usernets:bare", "--calib", "x.npz", "-o", "b.dwt")["sites"] == result["sites"]
    )
    calibration = [k for k in pw.load("a.dwt").program.meta["journal"] if k[0] == "calibration"]
    assert calibration[0][2]["batches"] == 2  # three samples in batches of two


def test_image_folder(run_json, folder):
    rng = np.random.default_rng(0)
    for i in range(6):
        path = folder / "images" / f"class{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (12 + i, 16, 3), dtype=np.uint8)).save(path)
    arguments = [
        "--calib",
        "images",
        "--size",
        8,
        "--mean",
        "0.5,0.5,0.5",
        "--std",
        "0.25,0.25,0.25",
        "--batch",
        4,
    ]
    result = run_json("quantize", "usernets:net", *arguments, "-o", "a.dwt")
    assert result["sites"] > 3


def test_images_are_read_as_told(folder):
    ramp = np.arange(12 * 16 * 3, dtype=np.uint8).reshape(12, 16, 3)
    Image.fromarray(ramp).save("a.png")
    from pathlib import Path

    plain = read_image(Path("a.png"), ImageOptions())
    assert torch.equal(plain, torch.from_numpy(ramp.copy()).permute(2, 0, 1).float() / 255)
    cut = read_image(Path("a.png"), ImageOptions(size=8, resize=12))
    assert torch.equal(cut, plain[:, 2:10, 4:12])
    scaled = read_image(Path("a.png"), ImageOptions(mean=(0.5, 0.25, 0.0), std=(2.0, 2.0, 2.0)))
    torch.testing.assert_close(scaled[1], (plain[1] - 0.25) / 2)
    assert read_image(Path("a.png"), ImageOptions(gray=True)).shape == (1, 12, 16)
    assert read_image(Path("a.png"), ImageOptions(size=20)).shape == (3, 20, 20)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_exported_program(run_json, folder):
    model, example = user_module(folder).net()
    torch.export.save(torch.export.export(model, (example,)), "net.pt2")
    result = run_json("quantize", "net.pt2", "--calib", "usernets:batches", "-o", "a.dwt")
    direct = run_json("quantize", "usernets:net", "--calib", "usernets:batches", "-o", "b.dwt")
    assert result["difference"]["ops"] == direct["difference"]["ops"]
    x = np.load("x.npy")
    assert pw.load("a.dwt").run(x[:4]).shape == (4, 4)


def test_recipe_file_and_dynamic(run_json, folder):
    (folder / "mine.toml").write_text(
        pw.Recipe.preset("int8-weight").to_text().replace("int8-weight", "mine")
    )
    run_json("quantize", "usernets:net", "--recipe", "mine.toml", "-o", "a.dwt")  # needs no data
    assert 'name = "mine"' in pw.load("a.dwt").program.meta["recipe"]
    run_json("quantize", "usernets:net", "--recipe", "int8-dynamic", "-o", "b.dwt")


def test_module_file(run_json, folder):
    run_json("quantize", "usernets:branches", "--recipe", "int8-dynamic", "-o", "a.safetensors")
    model, x = user_module(folder).branches()
    assert pw.load("a.safetensors", model=model, example=x)(x).shape == (2, 8)


CALIB = ["--calib", "usernets:batches"]


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["usernets:boom", *CALIB], "it raised RuntimeError: no luck at all"),
        (["usernets:missing", *CALIB], "usernets has no 'missing'"),
        (["nomodule:net", *CALIB], "No module named 'nomodule'"),
        (["usernets", *CALIB], "no file, folder or reference"),
        (["usernets:number", *CALIB], "gives a int, not a module"),
        (["checkpoint.pth", *CALIB], "pickled checkpoint holds no network definition"),
        (["empty", *CALIB], "has no config.json"),
        (["x.pt2", *CALIB], "is no exported program"),
        (["usernets:net", *CALIB, "--recipe", "int9"], "no recipe 'int9'.*Did you mean 'int8'"),
        (["usernets:net", *CALIB, "--recipe", "bad.toml"], "unknown key 'rulez'.*Did you mean 'rules'"),
        (["usernets:net", *CALIB, "--keep", "layer9.*"], "'layer9.*'.*matches nothing"),
        (["usernets:net"], "needs --calib.*int8-dynamic"),
        (["usernets:bare"], "no --calib, and the model brings no example"),
        (["usernets:net", "--calib", "usernets:poisoned"], "NaN or infinite.*batch 0|batch 0.*NaN or infinite"),
        (["usernets:net", "--calib", "usernets:nothing"], "there is no batch|no calibration batch"),
        (["usernets:net", "--calib", "usernets:number"], "gives a int, not an iterable of batches"),
        (["usernets:net", "--calib", "empty"], "no image in the folder"),
        (["usernets:net", "--calib", "text.npy"], "no numpy file"),
        (["usernets:net", "--calib", "objects.npy"], "no numpy file.*objects"),
        (["usernets:net", "--calib", "zero.npy"], "no sample in it"),
        (["usernets:net", "--calib", "ragged.npz"], "different numbers of samples"),
        (["usernets:net", "--calib", "strings.npy"], "are no model inputs"),
        (["usernets:branches", "--recipe", "int8-dynamic"], r"no whole-graph form.*usernets.py:\d+"),
    ],
)  # fmt: skip
def test_refusals(run, folder, arguments, what):
    (folder / "empty").mkdir()
    (folder / "x.pt2").write_bytes(b"nothing of the kind")
    (folder / "bad.toml").write_text("rulez = 1\n")
    (folder / "text.npy").write_text("hello")
    np.save("objects.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    np.save("zero.npy", np.zeros((0, 3, 8, 8), np.float32))
    np.save("strings.npy", np.array(["a", "b"]))
    np.savez("ragged.npz", a=np.zeros(3), b=np.zeros(4))
    code, out, err = run("quantize", *arguments, "-o", "out.dwt")
    import re

    assert code == 3, out + err
    assert re.search(what, err), err
    assert not (folder / "out.dwt").exists()


@pytest.mark.skipif("transformers" in sys.modules, reason="transformers is installed here")
def test_hugging_face_needs_the_extra(run, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    (folder / "hf").mkdir()
    (folder / "hf" / "config.json").write_text('{"architectures": ["BertModel"]}')
    code, _, err = run("quantize", "hf", "-o", "out.dwt")
    assert code == 4
    assert "pip install 'pennyweight[llm]'" in err


def test_slow_layers_are_measured(run_json, monkeypatch):
    from pennyweight import keep_slow

    rounds = iter([{"5": {"us": 2.0, "float_us": 1.0, "kernel": "scalar::gemm"}}, {}])
    monkeypatch.setattr(keep_slow, "slow_layers", lambda *a: next(rounds))
    monkeypatch.setattr(keep_slow, "speedup", lambda *a: 1.5)
    result = run_json(
        "quantize", "usernets:net", "--calib", "usernets:batches", "-o", "a.dwt", "--keep-slow-layers-float"
    )
    assert result["slow"] == [
        {"site": "5", "us": 2.0, "float_us": 1.0, "kernel": "scalar::gemm", "kept": True}
    ]
    # with it the pool before it, which no integer operation reads then
    assert result["kept"][0]["site"] == "5"

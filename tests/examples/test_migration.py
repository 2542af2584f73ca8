"""The listings that PyTorch took away: train, convert, run on integers, save, load."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import pennyweight as pw

FOLDER = Path(__file__).parents[2] / "examples" / "migration"
CASES = {
    "eager_cnn": ["--epochs", "2", "1"],
    "fx_resnet": ["--width", "8", "--steps", "6", "4"],
    "llama_int4": ["--steps", "30", "10"],
}


def listing(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", CASES)
def test_trains_converts_saves_and_loads(tmp_path, name):
    converted, x, figures = listing(name).main([*CASES[name], "--out", str(tmp_path)])
    tolerance = 0.01 if name == "llama_int4" else 3
    assert figures["converted"] == pytest.approx(figures["trained"], abs=tolerance)
    codes = {n: t.dtype for n, t in converted.state_dict().items() if n.endswith("codes")}
    assert codes
    assert set(codes.values()) == ({torch.uint8} if name == "llama_int4" else {torch.int8})
    stored = next(p for p in tmp_path.glob("int*.pt"))
    state = torch.load(stored, weights_only=True)
    assert all(torch.equal(v, state[k]) or (v != v).all() for k, v in converted.state_dict().items())
    example = x[:4]
    pw.save(converted, tmp_path / "a.dwt", example=example)
    with torch.no_grad():
        eager = converted(example).numpy()
    mine = pw.load(tmp_path / "a.dwt")(example.numpy())
    assert np.sqrt(((mine - eager) ** 2).mean()) < 0.05 * np.sqrt((eager**2).mean())

"""A folder with a user's module, its data, and a way to call the command line in it."""

import json
import sys

import numpy as np
import pytest

from pennyweight.cli.main import main

SOURCE = """
import torch
from torch import nn

def example():
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))

def bare():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(8, 4)).eval()

def net():
    return bare(), example()

def batches():
    return [torch.randn(2, 3, 8, 8) for _ in range(6)]

def poisoned():
    return [torch.full((2, 3, 8, 8), float("nan"))]

def nothing():
    return []

def boom():
    raise RuntimeError("no luck\\nat all")

def number():
    return 7

class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(8, 8)
    def forward(self, x):
        return self.a(x) if x.sum() > 0 else x

def branches():
    return Branches().eval(), torch.ones(2, 8)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder of the command."""
    (tmp_path / "usernets.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    sys.modules.pop("usernets", None)
    rng = np.random.default_rng(0)
    np.save("x.npy", rng.standard_normal((5, 3, 8, 8), dtype=np.float32))
    yield tmp_path
    sys.modules.pop("usernets", None)


@pytest.fixture
def run(folder, capsys):
    """Call the command; returns (exit code, standard output, standard error)."""

    def call(*arguments):
        code = main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture
def run_json(run):
    """Call the command with --json; returns the object, after checking that it went well."""

    def call(*arguments):
        code, out, err = run(*arguments, "--json")
        assert code == 0, err
        return json.loads(out)

    return call


@pytest.fixture
def model_file(run):
    """A quantized file of the user's network."""
    code, _, err = run("quantize", "usernets:net", "--calib", "usernets:batches", "-o", "m.dwt")
    assert code == 0, err
    return "m.dwt"

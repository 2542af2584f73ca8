"""What accuracy is measured on, and the classes that peers give."""

import importlib
import importlib.util
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def module(monkeypatch):
    """A file of the benchmarks by its name."""
    pytest.importorskip("PIL")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.syspath_prepend(str(BENCHMARKS / "contenders"))
    return importlib.import_module


def test_ten_crops_are_what_crop_cuts(module):
    pictures = module("pictures")
    images = np.random.default_rng(0).integers(0, 256, (2, 256, 256, 3), dtype=np.uint8)
    found = pictures.crop(pictures.ten_crops(images)).permute(0, 2, 3, 1).numpy()
    corners = [images[:, y : y + 224, x : x + 224] for y, x in ((16, 16), (0, 0), (0, 32), (32, 0), (32, 32))]
    wanted = np.concatenate([v for c in corners for v in (c, c[:, :, ::-1])])
    assert found.shape == (20, 224, 224, 3)
    assert np.array_equal(found, wanted)


def test_a_network_with_its_options(module, monkeypatch):
    pictures = module("pictures")
    images = np.zeros((3, 256, 256, 3), np.uint8)

    def made(folder, **options):
        return SimpleNamespace(images=images[: options.pop("limit", 3)], labels=np.arange(3), options=options)

    monkeypatch.setattr(pictures, "data_folder", Path)
    monkeypatch.setattr(pictures, "NETWORKS", {"squeezenet": made, "mcunet": made})
    assert pictures.network_of("mcunet", 2, 5).options == {"draw": 5}
    assert len(pictures.network_of("mcunet", 2, ten=True).images) == 2
    found = pictures.network_of("squeezenet", ten=True)
    assert len(found.images) == len(found.labels) == 30
    assert list(found.labels[::3]) == [0] * 10


@pytest.mark.parametrize(("results", "cut", "first"), [(10, 0, 0), (1000, 0, 0), (1001, 1, 1)])
def test_a_padded_classifier_keeps_its_rows(module, results, cut, first):
    classes = module("classes")
    model = nn.Sequential(nn.Linear(8, results))
    old = model[0]
    assert classes.padded(model) == cut
    count = results - first
    x = torch.randn(4, 8)
    assert model(x).shape == (4, 1000)
    torch.testing.assert_close(model(x)[:, :count], old(x)[:, first:])


def test_a_peer_that_fails_has_no_classes(module, monkeypatch, tmp_path):
    peers = module("peers_accuracy")
    monkeypatch.setattr(peers, "data_folder", lambda: tmp_path)
    assert peers.run_peer("false", "nncf", "mcunet", {}) is None
    script = tmp_path / "python"
    script.write_text('#!/bin/sh\nprintf "" >"$5"; exit 3\n')
    script.chmod(0o755)
    assert peers.run_peer(str(script), "nncf", "mcunet", {}) is None

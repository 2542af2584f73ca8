"""The tutorial runs, is short, and says what its text says."""

import importlib.util
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "one_file.py"


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    spec = importlib.util.spec_from_file_location("one_file", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main(["--images", "100", "--out", str(tmp_path_factory.mktemp("out"))])


def test_it_fits_in_300_lines():
    assert len(EXAMPLE.read_text("utf8").splitlines()) < 300


def test_accuracies(found):
    results = found["results"]
    assert results["float"] > 90
    assert results["int8 file"] >= results["float"] - 2  # of 100 images
    assert results["classifier in float"] >= results["float"] - 2
    assert results["4-bit weights"] > 60


def test_mistakes_are_explained(found):
    said = dict(line.split(": ", 1) for line in found["said"][:3])
    assert "Did you mean 'int8'" in said["RecipeError"]
    assert "matches nothing" in said["UnusedRule"]
    assert "batch 0" in said["NonFinite"]
    assert all(line.startswith("InputError: ") for line in found["said"][3:])
    assert len(found["said"]) == 5

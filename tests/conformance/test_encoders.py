"""Real recurrent networks and encoders keep their accuracy: the rows of benchmarks/encoders.py hold what is promised."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

HARNESS = Path(__file__).resolve().parents[2] / "benchmarks" / "encoders.py"


@pytest.fixture(scope="module")
def harness():
    spec = importlib.util.spec_from_file_location("benchmark_encoders", HARNESS)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def rows(harness, name, recipes=("int8-dynamic", "int8")):
    try:
        with torch.no_grad():
            return list(harness.NETWORKS[name](list(recipes), True, 0))
    except harness.Missing as reason:
        pytest.skip(str(reason))


def test_spoken_digits(harness):
    for row in rows(harness, "digits"):
        assert row.float_value == pytest.approx(97.67, abs=0.01)
        assert row.drop <= 0.4
        assert row.program_max_abs == 0  # nothing but codes, exact functions and moves
        assert row.float_bytes / row.constant_bytes >= 3.8
        assert row.sizes.count("batch") == 2
        assert "length" in row.sizes


def test_characters(harness):
    for row in rows(harness, "chars"):
        assert row.count == 65536
        assert row.drop <= 0.005 * row.float_value
        assert row.program_max_abs == 0
        assert row.float_bytes / row.constant_bytes >= 3.8
        assert row.sizes == "i64[batch, length]"


def test_transformer_stack(harness):
    for row in rows(harness, "stack"):
        assert row.cosine > 0.999
        assert row.least_cosine > 0.99
        assert row.program_cosine > 0.999
        assert row.float_bytes / row.constant_bytes > 3.4


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_sentences(harness):
    dynamic, static = rows(harness, "minilm")
    for row in (dynamic, static):
        assert row.drop <= 0.5
        assert row.float_bytes / row.file_bytes > 3.8
        assert (
            row.program_cosine > 0.98
        )  # a code that flips early makes noise of the size of the rounding itself
    assert dynamic.cosine > 0.99
    assert static.cosine > 0.98

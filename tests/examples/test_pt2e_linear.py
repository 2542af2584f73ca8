"""The PT2E listing: the same calls as before, trained, converted, saved, loaded, and run by the engine."""

import difflib
import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import pennyweight as pw

FOLDER = Path(__file__).parents[2] / "examples" / "migration"
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def listing():
    spec = importlib.util.spec_from_file_location("pt2e_linear", FOLDER / "pt2e_linear.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["pt2e_linear"] = module  # the exporter looks a forward's globals up there
    spec.loader.exec_module(module)
    yield module
    del sys.modules["pt2e_linear"]


def test_only_imports_differ_from_the_old_listing():
    old, new = ((FOLDER / p / "pt2e_linear.py").read_text("utf8").splitlines() for p in ("old", "."))
    changed = [d[2:] for d in difflib.ndiff(old, new) if d[:2] in ("- ", "+ ")]
    assert [line for line in changed if line and not line.startswith("from ")] == []


@pytest.mark.parametrize("flags", [[], ["--program"]])
def test_it_runs_and_its_integers_reach_the_engine(listing, tmp_path, flags):
    found, quantized = listing.main(["--steps", "120", "--out", str(tmp_path), *flags])
    assert found["float"] > 90
    assert found["quantized"] >= found["float"] - 1
    assert found["loaded"] == found["quantized"]
    assert {str(t.dtype) for n, t in quantized.state_dict().items() if n.endswith("codes")} == {"torch.int8"}
    pw.save(quantized, tmp_path / "a.dwt")
    x = listing.samples(9, seed=3)[0]
    with torch.no_grad():
        np.testing.assert_allclose(
            pw.load(tmp_path / "a.dwt").run(x.numpy()), quantized(x).numpy(), atol=1e-5
        )

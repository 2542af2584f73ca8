"""The library built with sanitizers replays every small program, whole networks out of files, and rounding in training.

No finding of ThreadSanitizer (races), AddressSanitizer (memory, leaks) or UndefinedBehaviorSanitizer, and the same bits.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import programs
import recording

import pennyweight as pw
from pennyweight.program.ops import definitions
from pennyweight.runtime import read

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


def small_networks():
    """Networks of the benchmarks, scaled down: eval-mode model, two batches, recipe."""
    spec = importlib.util.spec_from_file_location("sanitized_networks", ROOT / "benchmarks" / "networks.py")
    nets = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(nets)
    nets.VOCABULARY = 100
    torch.manual_seed(3)
    yield nets.MobileNetV2().eval(), [(torch.randn(2, 3, 32, 32),) for _ in range(2)], "int8"
    for recipe in ("int8", "int8-dynamic"):
        model = nets.MiniLM(width=64, depth=2, heads=4).eval()
        mask = (torch.arange(16) < 13).long().expand(2, 16).contiguous()
        yield model, [(torch.randint(0, 100, (2, 16)), mask) for _ in range(2)], recipe


def recordings(folder: Path):
    for family in programs.EXACT:
        for case, program in family():
            yield recording.recorded(case.name, program, case.inputs, exact=True)
    for case, program in programs.inexact():
        yield recording.recorded(case.name, program, case.inputs, exact=False)
    for i, (model, batches, recipe) in enumerate(small_networks()):
        path = folder / f"{i}.dwt"
        pw.save(pw.quantize(model, batches, recipe, progress=False), path, batches[0])
        program = read(path)
        inputs = dict(zip(program.inputs, [x.numpy() for x in batches[1]], strict=True))
        exact = all(definitions[op.kind].exact for op in program.ops)
        yield recording.recorded(f"{type(model).__name__}, {recipe}", program, inputs, exact)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recorded")
    assert recording.write(folder / "programs.rec", recordings(folder)) > 150
    return folder / "programs.rec"


@pytest.mark.parametrize("sanitizers", ["thread", "address,undefined"])
def test_no_findings(sanitizers, file):
    if not shutil.which("cmake"):
        pytest.skip("there is no cmake here")
    folder = ROOT / "build" / f"sanitize-{sanitizers.replace(',', '-')}"
    for command in (
        ["cmake", "-S", str(ROOT / "native"), "-B", str(folder), f"-DPW_SANITIZE={sanitizers}"],
        ["cmake", "--build", str(folder), "--parallel", "2"],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    done = subprocess.run([str(folder / "replay"), str(file)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-4000:]
    assert "0 results wrong" in done.stdout

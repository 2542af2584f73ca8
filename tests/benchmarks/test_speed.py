"""The speed harness: real workers take turns; one that dies says why."""

import importlib
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def speed(monkeypatch, tmp_path):
    """The harness, with contenders of the test's own."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("speed")
    folder = tmp_path / "contenders"
    folder.mkdir()
    (folder / "worker.py").write_text((BENCHMARKS / "contenders" / "worker.py").read_text())
    (folder / "fake.py").write_text(
        textwrap.dedent(
            """
            import time
            import numpy as np

            def sleeper(seconds):
                def make(name, threads, work, batch):
                    print("a library that talks")
                    def run():
                        time.sleep(seconds)
                        return np.array([[batch, seconds]])
                    return run
                return make

            fast, steady, slow = sleeper(0.002), sleeper(0.01), sleeper(0.04)

            def broken(name, threads, work, batch):
                raise ValueError(f"{name} is not for me")
            """
        )
    )
    monkeypatch.setattr(module, "WORKER", folder / "worker.py")
    monkeypatch.setattr(module, "BLOCK_NS", 20_000_000)
    yield module
    for name in ("speed", "networks"):
        sys.modules.pop(name, None)


def test_ratios(speed, tmp_path):
    rows = speed.compete("anything", ["fake:steady", "fake:slow"], {}, 1, 5, tmp_path)
    fast, slow = rows
    assert fast.ratio == 1
    assert 2.5 < slow.ratio < 5
    assert 2 <= fast.p50 < slow.p50
    assert slow.calls >= 5
    assert "fake:slow" in speed.table(rows)


def test_turns_pair_up(speed, tmp_path):
    worker = speed.Worker("fake:fast", "anything", 1, tmp_path, sys.executable)
    try:
        found = speed.take_turns({"a": worker, "b": worker}, 3)
        assert len(found["a"].blocks) == len(found["b"].blocks) == 3
        assert np.allclose(worker.output, [1, 0.002])
    finally:
        worker.close()


def test_batches_reach_the_contender(speed, tmp_path):
    worker = speed.Worker("fake:fast", "anything", 1, tmp_path, sys.executable, batch=3)
    worker.close()
    assert worker.output[0] == 3


def test_networks_take_batches(speed):
    """Small ones run; sizes of the others are those of their inputs."""
    networks = sys.modules["networks"]
    for name in speed.FIELD:
        first, *_ = networks.inputs(name, 1, 3)
        assert first.shape[0] == 3
        assert len(networks.calibration(name, 2, 3)) == 2
    with networks.torch.no_grad():
        assert networks.network("lstm")(*networks.inputs("lstm", 1, 2)).shape == (2, networks.UNITS)
        assert networks.network("resnet18")(*networks.inputs("resnet18", 1, 2)).shape == (2, 1000)


def test_a_worker_that_dies_says_why(speed, tmp_path):
    with pytest.raises(
        speed.WorkerDied, match=r"fake:broken ended with 1: ValueError: this one is not for me"
    ):
        speed.compete("this one", ["fake:broken"], {}, 1, 1, tmp_path)


def test_the_field_has_functions(speed):
    """Names of contenders are functions of their files, read without the peers' packages."""
    import ast

    for contenders in speed.FIELD.values():
        for contender in contenders:
            file, _, function = contender.partition(":")
            tree = ast.parse((BENCHMARKS / "contenders" / f"{file}.py").read_text())
            assert function in [n.name for n in tree.body if isinstance(n, ast.FunctionDef)], contender

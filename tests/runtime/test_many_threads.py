"""Thousands of inferences from eight threads on one loaded file: the results of one thread alone, in memory that stays.

Each case is a process of its own, without torch, so that the memory measured is the runtime's.
"""

import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from torch import nn

import pennyweight as pw

WORKER = textwrap.dedent(
    """
    import gc, sys, threading
    import numpy as np
    import pennyweight.runtime as runtime

    path, cases, count, threads = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    session = runtime.load(path, backend="native", threads=threads)
    with np.load(cases) as file:
        names = [p.name for p in session.inputs]
        inputs = [[file[f"{i}.{n}"] for n in range(len(names))] for i in range(int(file["count"]))]
    alone = runtime.load(path, backend="native", threads=1)
    expected = [alone.run(*x) for x in inputs]
    del alone

    def resident():
        gc.collect()
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    CALLERS = 8
    wrong, measured, gate = [], [], threading.Barrier(CALLERS + 1)

    def caller(seed):
        # which input comes when differs from caller to caller; the first round is the warm-up: every size, then as many
        orders = np.random.default_rng(seed).integers(0, len(inputs), (2, count // CALLERS)).tolist()
        for round in ([*range(len(inputs)), *orders[0]], orders[1]):
            gate.wait()
            for i in round:
                if not np.array_equal(session.run(*inputs[i]), expected[i]):
                    wrong.append(i)
            gate.wait()

    callers = [threading.Thread(target=caller, args=(i,)) for i in range(CALLERS)]
    for c in callers:
        c.start()
    for _ in range(2):
        gate.wait()
        gate.wait()
        measured.append(resident())
    for c in callers:
        c.join()
    assert "torch" not in sys.modules
    print(len(wrong), measured[1] - measured[0])
    """
)
GROWTH = 2 << 20  # bytes; two hundred a call would be as much in 10,000 calls


def image_network():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, 1, 1, groups=16), nn.ReLU(),
        nn.Conv2d(16, 32, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip
    return net.eval(), "int8", [(torch.randn(n, 3, 24, 24),) for n in (2, 2, 1, 3, 4, 5, 8)]


def recurrent_network():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.cells, self.head = nn.LSTM(12, 16, batch_first=True), nn.Linear(16, 4)

        def forward(self, x):
            return self.head(self.cells(x)[0])

    torch.manual_seed(0)
    return Net().eval(), "int8-dynamic", [(torch.randn(n, 7, 12),) for n in (2, 2, *range(1, 9))]


def encoder():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    return model, "int8", [(torch.randn(n, 9, 32),) for n in (2, 2, 1, 3, 4, 5, 6, 7)]


def many_sizes():
    """More sets of sizes than an engine keeps plans: plans are thrown away while others run them."""
    model, recipe, batches = image_network()
    return model, recipe, batches[:2] + [(torch.randn(n, 3, 24, 24),) for n in range(1, 81)]


NETWORKS = {"images": image_network, "recurrent": recurrent_network, "encoder": encoder, "sizes": many_sizes}


def crowd(folder, name, count, threads):
    """(wrong results, bytes that memory grew by after the warm-up)"""
    model, recipe, batches = NETWORKS[name]()
    path = folder / "model.dwt"
    pw.save(pw.quantize(model, batches[:2], recipe, progress=False), path, batches[0])
    arrays = {f"{i}.{n}": x.numpy() for i, batch in enumerate(batches) for n, x in enumerate(batch)}
    np.savez(folder / "cases.npz", count=len(batches), **arrays)
    done = subprocess.run(
        [sys.executable, "-c", WORKER, str(path), str(folder / "cases.npz"), str(count), str(threads)],
        capture_output=True, text=True, check=False, env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return [int(v) for v in done.stdout.split()]


needs_proc = pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="memory is read from /proc")  # noqa: PTH110


@needs_proc
@pytest.mark.parametrize(("name", "threads"), [("images", 2), ("recurrent", 1), ("encoder", 2)])
def test_hundreds(tmp_path, name, threads):
    wrong, growth = crowd(tmp_path, name, 800, threads)
    assert wrong == 0
    assert growth < GROWTH


@pytest.mark.slow
@needs_proc
@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("name", NETWORKS)
def test_ten_thousand(tmp_path, name, threads):
    wrong, growth = crowd(tmp_path, name, 10_000, threads)
    assert wrong == 0
    assert growth < GROWTH

"""`pw.profile` on real networks: every layer named with the kernel that ran, compared with float."""

import json

import numpy as np
import pytest
import torch
from torch import nn

import pennyweight as pw
from pennyweight.errors import InputError
from pennyweight.profiling import arrays_of, hooked_times
from pennyweight.runtime import library

OURS = {"copy", "fill", "gather", "scalar", "mean", "sum", "numpy"}  # steps without a kernel of the table


def network(width=48):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10),
    ).eval()  # fmt: skip


X = torch.randn(2, 3, 40, 40, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def quantized():
    return pw.quantize(network(), [X], progress=False)


@pytest.fixture(scope="module")
def report(quantized):
    return pw.profile(quantized, against=network(), threads=1, seconds=0.2)


def test_nearly_all_of_the_time_has_a_name(report):
    assert 0.85 < report.coverage < report.named <= 1.0
    assert sum(layer.share for layer in report.layers) == pytest.approx(report.coverage)
    assert report.around_ns < 0.1 * report.wall_ns


def test_timing_steps_costs_little(report):
    assert report.wall_ns < 1.5 * report.plain_ns  # two readings of the clock a step, and the machine's noise


def test_layers_have_their_names_kernels_and_float_times(report):
    layers = {layer.site: layer for layer in report.layers}
    assert {"0", "3", "7"} <= set(layers)
    symbols = {symbol for _, _, symbol in library.kernels()} | OURS
    assert {s.kernel for layer in report.layers for s in layer.steps} <= symbols
    assert layers["3"].macs == 2 * 40 * 40 * 48 * 48 * 9
    assert layers["3"].kernel.endswith("::gemm")
    assert layers["3"].bytes >= 2 * 40 * 40 * 48 * 2 + 48 * 48 * 9  # both activations, the weights
    for site in ("0", "3", "7"):
        assert layers[site].float_ns > 0
        assert layers[site].speedup == pytest.approx(layers[site].float_ns / layers[site].ns)
    assert report.float_source.startswith("the float program")
    assert (
        report.float_wall_ns > report.plain_ns
    )  # 3 x 3 convolutions in int8 against float32, one thread each
    json.dumps(report.to_dict())


def test_a_float_model_without_a_graph_is_timed_by_hooks(quantized):
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network()

        def forward(self, x):
            return self.inner(x) if x.sum() > -1e9 else x

    q = nn.Sequential()
    q.inner = quantized
    report = pw.profile(q, X, against=Branching().eval(), seconds=0.05)
    assert "hooks" in report.float_source
    layers = {layer.site: layer for layer in report.layers}
    assert layers["inner.0"].float_ns > 0
    assert report.float_wall_ns is None


def test_hooks_leave_no_trace():
    model = network()
    times = hooked_times(model, X, 1)
    assert set(times) == {str(i) for i in range(8)}
    assert all(t > 0 for t in times.values())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_files_and_arrays(quantized, tmp_path):
    path = pw.save(quantized, tmp_path / "m.dwt")
    found = pw.profile(path, X.numpy(), seconds=0.02)
    assert {"0", "3", "7"} <= {layer.site for layer in found.layers}
    again = pw.profile(pw.load(path), {"input": X.numpy()}, seconds=0.02)
    assert [layer.site for layer in again.layers] == [layer.site for layer in found.layers]
    with pytest.raises(InputError, match="no example"):
        pw.profile(path)
    with pytest.raises(InputError, match="2 tensors"):
        arrays_of(pw.load(path), (X, X))


def test_the_interpreter_is_profiled_too(quantized):
    report = pw.profile(quantized, backend="reference", seconds=0.0)
    assert report.isa == "numpy"
    assert {"0", "3", "7"} <= {layer.site for layer in report.layers}
    assert report.coverage > 0.5


def test_results_are_those_of_a_plain_run(quantized, tmp_path):
    session = pw.load(pw.save(quantized, tmp_path / "m.dwt"))
    inputs = session.checked((X.numpy(),))
    before = session.run(X.numpy())
    session.engine.timed(inputs)
    assert np.array_equal(before, session.run(X.numpy()))

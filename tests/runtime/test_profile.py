"""The execution report on scripted times: who is charged for what, and the verdicts."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from pennyweight.errors import InputError
from pennyweight.runtime.peaks import Peaks
from pennyweight.runtime.profile import BANDWIDTH, EVEN, OVERHEAD, PAYS, SLOWER, profile_session

PEAKS = Peaks(
    "cpu", "1", {"int8 avx2": {1: 1e9}, "f32 avx2": {1: 1e8}, "bits avx2": {1: 1e10}},
    {"L2": {1: 1e10}, "L3": {1: 1e9}, "memory": {1: 1e8}}, {"L2": 10_000, "L3": 100_000},
)  # fmt: skip
RUN_NS = 100_000


class Engine:
    """Steps whose times are known: (op, site, kernel, ns, macs, bytes)."""

    threads, isa = 1, "avx2"

    def __init__(self, *rows):
        self.rows = rows

    def run(self, inputs):
        return {}

    def steps(self, inputs):
        keys = ("op", "site", "kernel", "macs", "bytes")
        return [dict(zip(keys, (*r[:3], *r[4:]), strict=True), tasks=1) for r in self.rows]

    def timed(self, inputs):
        times = [r[3] for r in self.rows]
        return times, 1000, RUN_NS


def session(*rows):
    program = SimpleNamespace(inputs={"x": None})
    return SimpleNamespace(
        engine=Engine(*rows), program=program, backend="native", checked=lambda inputs: inputs[0]
    )


QUANTIZED = session(
    ("quantize", "a", "avx2::quantize", 2_000, 0, 100),
    ("conv+requant_add", "a", "avx2::gemm", 20_000, 15_000, 5_000),
    ("transpose", "b", "copy", 10_000, 0, 50_000),
    ("attention", "b:matmul/0", "avx2::gemm", 10_000, 100, 100),
    ("conv", "c", "avx2::depthwise", 30_000, 100, 100),
    ("layer_norm+quantize", "d", "avx2::layer_norm", 8_000, 0, 100),
    ("copy", "e", "copy", 5_000, 0, 4_000),
    ("unary:sqrt", "f", "scalar", 1_000, 0, 100),
)
FLOAT = session(
    ("conv", "a", "avx2::gemm_f32", 40_000, 15_000, 20_000),
    ("unary:relu", "relu", "scalar", 2_000, 0, 100),
    ("transpose", "b", "copy", 60_000, 0, 200_000),
    ("matmul_f32", "b", "avx2::gemm_f32", 30_000, 100, 400),
    ("conv", "c", "avx2::gemm_f32", 20_000, 100, 400),
    ("layer_norm", "d", "avx2::layer_norm", 4_000, 0, 400),
    ("unary:sqrt", "f", "scalar", 1_000, 0, 100),
)
X = {"x": np.zeros(1, np.float32)}


@pytest.fixture(scope="module")
def report():
    return profile_session(QUANTIZED, X, against=FLOAT, peaks=PEAKS, seconds=0.0)


def test_layers_are_charged_with_what_they_dissolve(report):
    floats = {layer.site: layer.float_ns for layer in report.layers}
    # the activation, which has become part of the convolution; both sides of what one module does by functions
    assert floats == {"a": 42_000, "b": 90_000, "c": 20_000, "d": 4_000, "e": None, "f": 1_000}
    assert [layer.site for layer in report.layers] == ["a", "b", "c", "d", "e", "f"]
    assert [s.site for s in report.layers[1].steps] == ["b", "b:matmul/0"]


def test_verdicts(report):
    found = {layer.site: layer.verdict for layer in report.layers}
    # d rounds for the layers behind it, which no rule can take back; c is what a rule could keep in float
    assert found == {"a": PAYS, "b": BANDWIDTH, "c": SLOWER, "d": OVERHEAD, "e": OVERHEAD, "f": EVEN}
    assert [layer.site for layer in report.slower_than_float] == ["c"]


def test_rates_and_roofline(report):
    a, b = report.layers[:2]
    assert a.kernel == "avx2::gemm"
    assert a.op == "conv+requant_add"
    assert a.ns == 22_000
    assert a.macs_per_second == pytest.approx(15_000 / 22e-6)
    assert a.attainable_ns == pytest.approx(
        15_000 + 10
    )  # multiply-adds at the peak; the rounding reads 100 bytes
    assert a.of_peak == pytest.approx(15_010 / 22_000)
    assert a.bound == "compute"
    assert b.bound == "L3"
    assert b.attainable_ns == pytest.approx(50_000 + 100)
    assert a.speedup == pytest.approx(42 / 22)


def test_products_of_bits_have_a_peak_of_their_own():
    steps = session(("conv_binary+sign", "a", "avx2::bit_gemm", 20_000, 150_000, 100))
    layer = profile_session(steps, X, peaks=PEAKS, seconds=0.0).layers[0]
    assert layer.attainable_ns == pytest.approx(15_000)
    assert layer.of_peak == pytest.approx(0.75)


def test_shares_add_up(report):
    assert report.coverage == pytest.approx(0.86)
    assert sum(layer.share for layer in report.layers) == pytest.approx(0.86)
    rows = report.rows()
    assert [(row["layer"], row["us"]) for row in rows[-2:]] == [
        ("(threads and memory)", 1.0), ("(call from Python)", 13.0)
    ]  # fmt: skip
    assert report.named == pytest.approx(0.87)
    assert sum(row["us"] for row in rows) == pytest.approx(RUN_NS / 1e3)
    assert report.float_wall_ns is not None


def test_plain_values(report):
    data = json.loads(json.dumps(report.to_dict()))
    assert data["layers"][0]["steps"][1]["kernel"] == "avx2::gemm"
    assert data["layers"][2]["verdict"] == SLOWER
    assert data["coverage"] == pytest.approx(0.86)
    assert "87.0 % of it named, 86.0 % in layers" in report.summary()


def test_without_float_and_peaks():
    report = profile_session(QUANTIZED, X, seconds=0.0)
    assert [layer.site for layer in report.layers] == ["a", "b", "b:matmul/0", "c", "d", "e", "f"]
    assert {layer.site: layer.verdict for layer in report.layers if layer.verdict} == {
        "b": OVERHEAD,
        "e": OVERHEAD,
    }
    assert all(layer.of_peak is None and layer.speedup is None for layer in report.layers)
    assert "calibrate" in report.summary()
    assert "float us" not in report.rows()[0]
    assert "% of peak" not in report.rows()[0]


def test_given_float_times():
    report = profile_session(QUANTIZED, X, float_times={"a": 1_000.0}, float_source="by hand", seconds=0.0)
    assert report.layers[0].verdict == SLOWER
    assert report.float_source == "by hand"
    with pytest.raises(InputError, match="either"):
        profile_session(QUANTIZED, X, float_times={}, against=FLOAT)


def test_a_disturbed_layer_is_not_called_slow():
    class Shaken(Engine):
        calls = 0

        def timed(self, inputs):
            self.calls += 1
            slow = self.calls % 3  # two of three runs lose the processor: the median is high
            return [300_000 if slow else 1_000], 0, 400_000

    shaken = session(("conv", "c", "avx2::gemm", 0, 100, 100))
    shaken.engine = Shaken(*shaken.engine.rows)
    steady = session(("conv", "c", "avx2::gemm_f32", 50_000, 100, 400))
    report = profile_session(shaken, X, against=steady, seconds=0.0)
    assert report.layers[0].ns == 300_000
    assert report.slower_than_float == []

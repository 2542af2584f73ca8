"""The machine's peaks: measured, kept, found again, and never taken from a broken file."""

import json

import pytest

from pennyweight.errors import FormatError, KernelError
from pennyweight.runtime import library, peaks


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("PENNYWEIGHT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def measured():
    return peaks.measure(0.005)


def test_every_instruction_set_of_this_machine_is_measured(measured):
    for kind, op in peaks.KINDS.items():
        own = {isa for name, isa, _ in library.kernels() if name == op} & set(library.supported_isas())
        assert own == {name.split(" ")[1] for name in measured.macs if name.startswith(f"{kind} ")}
    assert set(measured.reads) == set(peaks.LEVELS)
    for rates in (*measured.macs.values(), *measured.reads.values()):
        assert 1 in rates
        assert all(rate > 1e6 for rate in rates.values())
    strongest = library.supported_isas()[-1]
    if strongest != "scalar":
        assert measured.compute("int8", strongest, 1) > 4 * measured.compute("int8", "scalar", 1)
        assert measured.compute("bits", strongest, 1) > 2 * measured.compute("bits", "scalar", 1)


def test_stored_and_found_again(measured, folder):
    assert peaks.stored() is None
    path = peaks.store(measured)
    assert path.parent == folder
    assert peaks.stored() == measured
    assert list(folder.iterdir()) == [path]  # nothing half-written beside it


def test_another_version_does_not_count(measured, monkeypatch):
    peaks.store(measured)
    monkeypatch.setattr(peaks.pennyweight, "__version__", "99")
    assert peaks.stored() is None


@pytest.mark.parametrize("damage", ["text", "list", "empty", "rates", "level"])
def test_broken_files_are_refused(measured, damage):
    path = peaks.store(measured)
    data = json.loads(path.read_text())
    if damage == "rates":
        data["reads"]["L2"]["1"] = -1.0
    if damage == "level":
        del data["reads"]["L3"]
    path.write_text({"text": "hello", "list": "[1]", "empty": ""}.get(damage, json.dumps(data)))
    with pytest.raises(FormatError, match="calibrate"):
        peaks.stored()


def test_rates_by_threads_and_sizes():
    p = peaks.Peaks(
        "cpu", "1", {"int8 avx2": {1: 10.0, 2: 20.0}, "f32 avx2": {1: 5.0}},
        {"L2": {1: 8.0, 4: 32.0}, "L3": {1: 4.0}, "memory": {1: 1.0}}, {"L2": 100, "L3": 1000},
    )  # fmt: skip
    assert p.compute("int8", "avx2", 3) == 20.0
    assert p.compute("int8", "amx", 1) == 10.0  # the strongest that was measured below it
    assert p.compute("f32", "", 2) == 5.0
    with pytest.raises(KernelError, match="fp8"):
        p.compute("fp8", "avx2", 1)
    assert p.bandwidth(100, 1) == ("L2", 8.0)
    assert p.bandwidth(300, 4) == ("L2", 32.0)
    assert p.bandwidth(300, 1) == ("L3", 4.0)
    assert p.bandwidth(1001, 1) == ("memory", 1.0)


def test_native_refusals():
    lib = library.load()
    assert lib.pw_measure_macs(0, 7, 1, 0.01) < 0
    assert "unknown kind" in library.last_error(lib)
    assert lib.pw_measure_macs(99, 0, 1, 0.01) < 0
    assert lib.pw_measure_macs(0, 0, 0, 0.01) < 0
    assert lib.pw_measure_reads(0, 10, 1, 0.01) < 0

"""Measured sensitivities: the layer that was made fragile is found, results are kept and reused."""

import copy

import pytest
import torch

from pennyweight.errors import FormatError, InputError
from pennyweight.journal import Journal
from pennyweight.tune import sensitivities
from pennyweight.tune.sensitivities import Sensitivity, sensitivity

ALL = ("both", "weights", "activations", "accumulated", "fisher", "hessian")


@pytest.fixture(scope="module")
def measured(quarters):
    model, x, _ = quarters
    return sensitivity(
        model, x[:128].split(32), formats=("int8", "int4"), measures=ALL, probes=3, progress=False
    )


def test_every_layer_has_every_part(measured):
    layers = {"first", "second", "last"}
    for form in ("int8", "int4"):
        for part in ("both", "weights", "activations", "accumulated"):
            assert {r.layer for r in measured.rows if r.form == form and r.part == part} == layers
    assert measured.samples == 64
    assert measured.task == "logits"


def test_accumulated_noise_ends_at_the_whole_model(measured):
    rows = [r for r in measured.rows if r.form == "int4" and r.part == "accumulated"]
    assert [r.layer for r in rows] == ["first", "second", "last"]
    alone = max(r.noise for r in measured.rows if r.form == "int4" and r.part == "both")
    assert rows[-1].noise > 0.5 * alone


def test_derivatives_rank_bits_as_measurements_do(measured):
    for layer in ("first", "second", "last"):
        row = {r.form: r for r in measured.rows if r.layer == layer and r.part == "weights"}
        assert row["int4"].fit > row["int8"].fit > 0
        assert row["int4"].kl > row["int8"].kl
        assert abs(row["int4"].hessian) > abs(row["int8"].hessian)


def test_a_fragile_layer_comes_first(quarters):
    model, x, _ = quarters
    fragile = copy.deepcopy(model)
    with torch.no_grad():  # within every row, one weight a hundred times the others: 4 bits keep it alone
        fragile.second.weight[:, 0, 0, 0] = 100 * fragile.second.weight.abs().max()
    found = sensitivity(
        fragile, [x[:64]], formats=("int4",), measures=("weights",), task="values", progress=False
    )
    assert found.ranked("int4", "weights")[0].layer in ("second", "last")
    rows = {r.layer: r.noise for r in found.rows}
    assert rows["second"] > rows["first"]


def test_the_cache_is_used_for_the_same_things_only(quarters, tmp_path, monkeypatch):
    model, x, _ = quarters
    file = tmp_path / "s.json"
    options = {"formats": ("int8",), "measures": ("weights",), "cache": file, "progress": False}
    first = sensitivity(model, [x[:32]], **options)
    made = []
    monkeypatch.setattr(sensitivities, "Probe", lambda *a, **k: made.append(1) or Probe(*a, **k))
    from pennyweight.tune.probe import Probe

    assert sensitivity(model, [x[:32]], **options).rows == first.rows
    assert not made
    more = sensitivity(model, [x[:32]], **{**options, "formats": ("int8", "int4")})
    assert [r for r in more.rows if r.form == "int8"] == first.rows
    assert len(made) == 1
    other = sensitivity(model, [x[32:64]], **options)
    assert other.fingerprint != first.fingerprint
    assert len(made) == 2


def test_files_and_journal_hold_it(measured, tmp_path):
    measured.save(tmp_path / "s.json")
    assert Sensitivity.load(tmp_path / "s.json") == measured
    log = Journal()
    measured.write(log)
    assert len(log.of("sensitivity")) == len(measured.rows)
    assert Journal.from_json(log.to_json()).rows("sensitivity")[0]["site"] == measured.rows[0].layer
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(FormatError, match="no stored sensitivity"):
        Sensitivity.load(tmp_path / "bad.json")


def test_what_was_not_measured_is_refused(measured, quarters):
    with pytest.raises(InputError, match="not measured"):
        measured.damage("first", "bf16")
    with pytest.raises(InputError, match="Did you mean 'hessian'"):
        sensitivity(quarters[0], [quarters[1][:8]], measures=("hesian",), progress=False)

"""`tune`, `diagnose` and `report` on the command line."""

import json
from pathlib import Path

import pytest


@pytest.fixture
def judged(folder):
    """An evaluation beside the user's networks."""
    text = (folder / "usernets.py").read_text()
    text += """
def same(model):
    with torch.no_grad():
        x = torch.cat(batches_of(4))
        return 100 * float((model(x).argmax(1) == bare()(x).argmax(1)).float().mean())

def worse(model):
    return 100.0 if type(model) is nn.Sequential and type(model[0]) is nn.Conv2d else 0.0

def batches_of(n):
    return list(torch.randn(8 * n, 3, 8, 8, generator=torch.Generator().manual_seed(1)).split(8))
"""
    (folder / "usernets.py").write_text(text)
    return folder


def test_tune_writes_model_and_report(run, judged):
    code, out, err = run(
        "tune", "usernets:net", "--evaluate", "usernets:same", "--calib", "usernets:batches", "-o", "best.dwt",
        "--report", "best.html", "--max-drop", "20", "--budget", "60 s", "--threads", "1",
    )  # fmt: skip
    assert code == 0, err
    assert "goal met" in out
    assert "calibrated" in out or "data-free" in out
    assert Path("best.dwt").stat().st_size > 100
    assert "report-data" in Path("best.html").read_text("utf8")
    code, out, err = run("report", "best.dwt", "-o", "again.html", "--title", "Again")
    assert code == 0, err
    assert "<title>Again</title>" in Path("again.html").read_text("utf8")


def test_tune_says_when_the_goal_is_not_met(run, judged):
    code, out, err = run(
        "tune", "usernets:net", "--evaluate", "usernets:worse", "--calib", "usernets:batches", "--max-drop", "0",
        "--budget", "0.1 s", "--threads", "1", "--json",
    )  # fmt: skip
    assert code == 1
    assert "NOT MET" in err
    assert json.loads(out)["met"] is False


def test_quantize_writes_a_report_and_keeps_what_it_shows(run, judged):
    code, _, err = run(
        "quantize", "usernets:net", "--calib", "usernets:batches", "-o", "q.dwt", "--report", "q.html"
    )
    assert code == 0, err
    assert run("report", "q.dwt", "-o", "again.html")[0] == 0
    for page in ("q.html", "again.html"):
        assert "chart-execution" in Path(page).read_text("utf8")


def test_diagnose(run, run_json, judged):
    result = run_json("diagnose", "usernets:net", "--calib", "usernets:batches", "--no-layers")
    assert result["sqnr_db"] > 10
    assert result["layers"] == []
    code, out, _ = run("diagnose", "usernets:net", "--calib", "usernets:batches")
    assert code == 0
    assert "dB from float's" in out


@pytest.mark.parametrize(
    ("arguments", "code", "what"),
    [
        (["diagnose", "usernets:net", "--target", "no-vni"], 3, "Did you mean 'no-vnni'"),
        (["diagnose", "usernets:bare"], 3, "brings no example"),
        (["tune", "usernets:net", "--evaluate", "usernets:nobody"], 3, "has no 'nobody'"),
        (["tune", "usernets:net", "--evaluate", "usernets:same", "--minimize", "speed"], 3, "cannot minimize 'speed'"),
        (["tune", "usernets:net", "--evaluate", "usernets:same", "--budget", "soon"], 3, "no span of time"),
        (["report", "nothing.dwt"], 4, "nothing.dwt"),
    ],
)  # fmt: skip
def test_refusals(run, judged, arguments, code, what):
    got, _, err = run(*arguments)
    assert got == code, err
    assert what in err

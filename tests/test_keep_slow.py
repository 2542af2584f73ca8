"""`keep_slow_layers_float`: what is measured to be slower stays float, if the whole run gains; all of it journaled."""

import pytest
import torch
from torch import nn

import pennyweight as pw
from pennyweight import keep_slow
from pennyweight.errors import NothingQuantized
from pennyweight.keep_slow import owner, slow_layers, without_slow_layers
from pennyweight.plan import Rule


class Net(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, width), nn.Linear(width, width), nn.Linear(width, 4)

    def forward(self, x):
        h = torch.relu(self.a(x))
        return self.c(torch.softmax(h @ self.b(h).transpose(-1, -2), -1) @ h)


X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
TIMES = {"us": 9.0, "float_us": 3.0, "kernel": "scalar::gemm"}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Net().eval()


def scripted(monkeypatch, rounds, gains):
    """What each round of measuring finds, and how much faster each candidate is."""
    found, faster = iter(rounds), iter(gains)
    monkeypatch.setattr(keep_slow, "slow_layers", lambda *a: dict.fromkeys(next(found), TIMES))
    monkeypatch.setattr(keep_slow, "speedup", lambda *a: next(faster))


def quantized(model, recipe="int8", batches=None):
    return pw.quantize(
        model, [X] if batches is None else batches, recipe, keep_slow_layers_float=True, progress=False
    )


def floats(model):
    return {name for name, m in model.named_modules() if type(m) is nn.Linear}


def test_a_slow_layer_stays_float(model, monkeypatch):
    scripted(monkeypatch, [["b"], []], [1.3])
    q = quantized(model)
    assert floats(q) == {"b"}
    assert torch.equal(q.b.weight, model.b.weight)
    log = pw.journal(q)
    assert log.rows("slow") == [{"site": "b", **TIMES, "kept": True}]
    assert log.rows("kept slow layers") == [{"site": "", "layers": 1, "speedup": 1.3, "accepted": True}]
    assert "by rule 'b'" in next(row["reason"] for row in log.rows("kept") if row["site"] == "b")
    assert torch.allclose(q(X), model(X), atol=0.1)


def test_what_gains_nothing_is_taken_back(model, monkeypatch):
    scripted(monkeypatch, [["b"]], [0.98])
    q = quantized(model)
    assert floats(q) == set()
    assert pw.journal(q).rows("slow")[0]["kept"] is False
    assert pw.journal(q).rows("kept slow layers")[0]["accepted"] is False


def test_neighbours_follow_in_later_rounds(model, monkeypatch):
    scripted(monkeypatch, [["b"], ["b", "c"], []], [1.2, 1.1])
    assert floats(quantized(model)) == {"b", "c"}


def test_later_rounds_that_lose_keep_the_earlier(model, monkeypatch):
    scripted(monkeypatch, [["b"], ["c"]], [1.2, 0.9])
    q = quantized(model)
    assert floats(q) == {"b"}
    assert [(row["site"], row["kept"]) for row in pw.journal(q).rows("slow")] == [("b", True), ("c", False)]


def test_a_call_stays_float(model, monkeypatch):
    scripted(monkeypatch, [[":matmul/0"], []], [1.2])
    plan = pw.state(quantized(model)).plan
    assert ":matmul/0" not in plan.layers
    assert ":matmul/1" in plan.layers


def test_a_rule_that_was_for_the_kept_layer_alone(model, monkeypatch):
    scripted(monkeypatch, [["b"], []], [1.2])
    own = Rule("b", weight=pw.QuantSpec.parse("int8n[1,*]"), input=pw.QuantSpec.parse("uint8[*]+z"))
    assert floats(quantized(model, pw.Recipe.preset("int8").with_rules(own))) == {"b"}


def test_all_layers_slow(model, monkeypatch):
    scripted(monkeypatch, [["a", "b", "c", ":matmul/0", ":matmul/1"]], [])
    with pytest.raises(NothingQuantized, match="faster in float"):
        quantized(model)


def test_batches_that_can_be_read_once(model, monkeypatch):
    scripted(monkeypatch, [["b"], []], [1.2])
    q = quantized(model, batches=(x for x in [X, X + 1, X + 2]))
    assert pw.journal(q).last("calibration").data["batches"] == 3


def test_measured_for_real():
    """Whatever is found, is found by measuring: the model works, and every layer said to be kept is float."""
    torch.manual_seed(0)
    model, x = Net(512).eval(), torch.randn(1, 64, 8)
    log = pw.Journal()
    q = pw.quantize(model, [x], keep_slow_layers_float=True, journal=log, progress=False)
    assert torch.allclose(q(x), model(x), atol=0.3)
    assert "b" in pw.state(q).plan.layers  # 64 x 512 x 512 products pay on any instruction set
    for row in log.rows("slow"):
        assert row["us"] > row["float_us"] > 0
        assert (row["site"] not in pw.state(q).plan.layers) == row["kept"]
    assert log.events == pw.journal(q).events


def test_a_layer_that_is_slow_is_found(model, monkeypatch):
    """With times from a profile: products by their own name, work without a rule of its own not at all."""
    q = pw.quantize(model, [X], progress=False)
    report = pw.profile(q, X, against=model, seconds=0.02)
    from dataclasses import replace

    slow = [replace(layer, float_ns=layer.ns / 3, verdict="slower than float") for layer in report.layers]
    monkeypatch.setattr(
        keep_slow, "profile", lambda *a, **k: replace(report, layers=tuple(slow), plain_ns=1.0)
    )
    found = slow_layers(q, model, 1, 0.01)
    assert {"a", "b", "c", ":matmul/0", ":matmul/1"} == set(found)
    assert found["a"]["kernel"].endswith("::gemm")
    monkeypatch.setattr(
        keep_slow, "profile", lambda *a, **k: replace(report, layers=tuple(slow), plain_ns=1e12)
    )
    assert slow_layers(q, model, 1, 0.01) == {}  # a loss that nobody would notice


def test_without_a_graph_layers_are_timed_as_they_run(monkeypatch):
    class Branching(Net):
        def forward(self, x):
            return super().forward(x) if x.sum() > -1e9 else x

    torch.manual_seed(0)
    model = Branching().eval()
    q = pw.quantize(model, [X], progress=False)
    times = {id(q): {"a": 9000.0, "b": 9000.0, "c": 900.0}, id(model): {"a": 3000.0, "b": 8900.0, "c": 950.0}}
    monkeypatch.setattr(keep_slow, "hooked_times", lambda m, *a: times[id(m)])
    assert slow_layers(q, model, 1, 0.01) == {"a": {"us": 9.0, "float_us": 3.0, "kernel": "eager"}}
    monkeypatch.undo()
    calls = []

    def make(recipe):
        calls.append(recipe)
        return pw.quantize(model, [X], recipe, progress=False)

    assert isinstance(without_slow_layers(model, pw.Recipe.preset("int8"), make, seconds=0.02), Branching)
    assert calls


def test_owners(model):
    plan = pw.state(pw.quantize(model, [X], progress=False)).plan
    assert owner(plan, "a") == "a"
    assert owner(plan, "a.inner.part") == "a"
    assert owner(plan, ":matmul/1") == ":matmul/1"
    assert owner(plan, ":relu/0") == owner(plan, "") == owner(plan, "none") == ""

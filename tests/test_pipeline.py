"""The verbs: your model stays your model, whatever it looks like."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pennyweight as pw
from pennyweight.errors import CalibrationError, PennyweightError


class Deciding(nn.Module):
    """Control flow that depends on values, dict in and out, tied weights, a raw parameter, `.item()`."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.raw = nn.Parameter(torch.randn(8, 8) * 0.3)
        self.out = nn.Linear(8, 11, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, ids, *, scale):
        x = self.embed(ids)
        steps = 0
        while x.abs().max().item() > 0.5 and steps < 4:
            x = x + self.down(F.relu(self.up(x))) * 0.1
            x = F.linear(x, self.raw) / x.norm(dim=-1, keepdim=True)
            steps += 1
        return {"logits": self.out(x) * scale, "steps": steps, "states": [x]}


def deciding():
    torch.manual_seed(0)
    batches = [{"ids": torch.randint(0, 11, (4, 6)), "scale": torch.tensor(2.0)} for _ in range(3)]
    return Deciding().eval(), batches


def test_preparing_shares_parameters_and_leaves_the_model_alone():
    model, batches = deciding()
    keys, types = list(model.state_dict()), [type(m) for m in model.modules()]
    with torch.no_grad():
        before = model(**batches[0])["logits"]
    prepared = pw.prepare(model, batches[0])
    assert type(prepared) is Deciding
    assert [type(m) for m in model.modules()] == types
    assert list(model.state_dict()) == keys
    own = dict(model.named_parameters())
    assert {n: id(p) for n, p in prepared.named_parameters()} == {n: id(p) for n, p in own.items()}
    assert set(keys) <= set(prepared.state_dict())
    assert isinstance(prepared.up, nn.Linear)
    with torch.no_grad():
        assert torch.equal(prepared(**batches[0])["logits"], before)
    prepared.load_state_dict(model.state_dict(), strict=False)


@pytest.mark.parametrize("recipe", ["int8", "int8-dynamic", "int8-weight"])
def test_any_control_flow(recipe):
    model, batches = deciding()
    result = pw.quantize(model, batches, recipe, progress=False)
    with torch.no_grad():
        want, got = model(**batches[1]), result(**batches[1])
    assert set(got) == set(want)
    assert float(F.cosine_similarity(got["logits"].flatten(), want["logits"].flatten(), 0)) > 0.99
    assert all(p.requires_grad for p in model.parameters())


def test_tied_weights_stay_one_parameter():
    model, batches = deciding()
    prepared = pw.prepare(model, batches[0])
    assert prepared.out.weight is prepared.embed.weight
    assert "out.weight" in prepared.state_dict()


@pytest.mark.parametrize("stage", ["prepared", "calibrated", "converted"])
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_at_every_stage(pictures, stage, clone):
    torch.manual_seed(2)
    layers = (
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )
    model = pw.prepare(nn.Sequential(*layers).eval(), pictures[0])
    if stage != "prepared":
        model = pw.calibrate(model, pictures, progress=False)
    if stage == "converted":
        model = pw.convert(model)
    again = clone(model)
    with torch.no_grad():
        assert torch.equal(again(pictures[0]), model(pictures[0]))
    assert pw.state(again).stage == stage
    if stage == "prepared":
        pw.calibrate(again, pictures, progress=False)
        assert pw.state(model).stage == "prepared"


def test_stages_come_in_order(cnn, pictures):
    with pytest.raises(PennyweightError, match="not prepared"):
        pw.calibrate(cnn, pictures)
    prepared = pw.prepare(cnn, pictures[0])
    with pytest.raises(CalibrationError, match="not calibrated"):
        pw.convert(prepared)
    pw.calibrate(prepared, pictures, progress=False)
    with pytest.raises(CalibrationError, match="not prepared"):
        pw.calibrate(prepared, pictures)


def test_training_mode_is_noted(cnn, pictures):
    result = pw.quantize(cnn.train(), pictures, progress=False)
    assert cnn.training
    assert not result.training
    assert any("training mode" in e.data.get("text", "") for e in pw.journal(result))


def test_the_journal_says_what_was_done(cnn, pictures):
    log = pw.Journal()
    result = pw.quantize(cnn, pictures, pw.Recipe.preset("int8").keep("head"), journal=log, progress=False)
    assert list(log) == list(pw.journal(result))
    assert {"recipe", "site", "kept", "range", "weight", "bias", "size", "calibration"} <= {
        e.kind for e in log
    }
    kept = {e.site: e.data["reason"] for e in log.of("kept")}
    assert "float32" in kept["head"]
    size = log.last("size").data
    assert size["after"] < size["before"]
    assert all(e.data["sqnr_db"] > 30 for e in log.of("weight"))
    assert "kept head" in log.summary()


def test_batches_from_a_function_and_from_an_iterator(cnn, pictures):
    one = pw.quantize(cnn, lambda: iter(pictures), progress=False)
    other = pw.quantize(cnn, iter(pictures), progress=False)
    with torch.no_grad():
        assert torch.equal(one(pictures[0]), other(pictures[0]))


def test_layers_in_half_precision(cnn, pictures):
    result = pw.quantize(
        cnn, pictures, pw.Recipe.preset("int8").keep("head", dtype="bfloat16"), progress=False
    )
    with torch.no_grad():
        want, got = cnn(pictures[0]), result(pictures[0])
    assert float((want - got).norm() / want.norm()) < 0.1
    assert any(p.dtype == torch.bfloat16 for p in [*result.parameters(), *result.buffers()])

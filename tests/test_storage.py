"""`pw.save` and `pw.load`: what is written runs alike, says how it was made, and refuses in words."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import pennyweight as pw
from pennyweight.errors import FormatError, LowerError, PennyweightError
from pennyweight.storage import fitted


def same(a, b):
    return torch.equal(torch.as_tensor(np.asarray(a)), torch.as_tensor(np.asarray(b)))


@pytest.fixture
def quantized(cnn, pictures):
    return pw.quantize(cnn, pictures)


def test_the_file_runs_as_the_module_does(quantized, pictures, tmp_path):
    path = pw.save(quantized, tmp_path / "a.dwt")
    session = pw.load(path)
    for batch in [*pictures, torch.cat(pictures), pictures[0][:1]]:
        with torch.no_grad():
            assert same(session.run(batch.numpy()), quantized(batch))


def test_what_the_file_says_of_itself(quantized, tmp_path):
    meta = pw.load(pw.save(quantized, tmp_path / "a.dwt")).program.meta
    assert pw.Recipe.parse(meta["recipe"]) == pw.Recipe.preset("int8")
    assert meta["versions"]["pennyweight"] == pw.__version__
    assert meta["versions"]["torch"] == torch.__version__
    assert meta["model"].endswith("Tiny")
    kinds = {kind for kind, _, _ in meta["journal"]}
    assert {"recipe", "site", "weight", "range", "size", "lowered"} <= kinds
    assert json.dumps(meta)


def test_the_difference_is_measured_and_recorded(quantized, pictures, tmp_path):
    pw.save(quantized, tmp_path / "a.dwt", example=pictures[1])
    pw.save(quantized, tmp_path / "b.dwt", example=pictures[0])
    events = pw.journal(quantized).of("lowered")
    assert len(events) == 1  # the newest measurement
    assert events[0].data["samples"] == 2
    assert events[0].data["max_abs"] == 0
    assert events[0].data["sqnr_db"] == 200
    assert events[0].data["argmax_differs"] == 0


def test_a_difference_that_exists_is_seen(quantized, pictures):
    program = pw.lower(quantized, pictures[0])
    head = next(op for op in reversed(program.ops) if op.kind == "rescale")
    constant = program.constants[head.inputs[1]]
    program.constants[head.inputs[1]] = type(constant)("f32", -constant.data)
    measured = pw.difference(quantized, program, pictures[0])
    assert measured["max_abs"] > 0
    assert measured["sqnr_db"] < 0
    assert measured["argmax_differs"] == 1


def test_saving_twice_gives_the_same_bytes(quantized, tmp_path):
    a, b = (pw.save(quantized, tmp_path / name).read_bytes() for name in ("a.dwt", "b.dwt"))
    assert a == b


def test_float_models_and_programs_can_be_saved(cnn, pictures, tmp_path):
    path = pw.save(cnn, tmp_path / "float.dwt", example=pictures[0])
    with torch.no_grad():
        expected = cnn(pictures[0]).numpy()
    np.testing.assert_allclose(pw.load(path).run(pictures[0].numpy()), expected, rtol=1e-4, atol=1e-5)
    again = pw.save(pw.load(path).program, tmp_path / "again.dwt")
    assert same(pw.load(again).run(pictures[0].numpy()), pw.load(path).run(pictures[0].numpy()))


def test_no_example(cnn, tmp_path):
    with pytest.raises(LowerError, match=r"no example batch.*example="):
        pw.save(cnn, tmp_path / "a.dwt")


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        if x.sum() > 0:  # the line to be named
            return self.a(x)
        return self.b(x)


def test_a_model_that_cannot_be_exported(tmp_path):
    x = torch.ones(2, 4)
    quantized = pw.quantize(Branches().eval(), [x], pw.Recipe.preset("int8-dynamic"))
    with pytest.raises(LowerError, match="no whole-graph form") as caught:
        pw.save(quantized, tmp_path / "a.dwt")
    text = str(caught.value)
    line = next(
        i
        for i, t in enumerate(Path(__file__).read_text("utf8").splitlines(), 1)
        if "the line to be named" in t
    )
    assert f"test_storage.py:{line}" in text
    assert "runs quantized all the same" in text
    assert list(tmp_path.iterdir()) == []
    assert quantized(x).shape == (2, 4)  # it does
    path = pw.save(quantized, tmp_path / "a.safetensors")
    assert same(pw.load(path, model=Branches(), example=x)(x).detach(), quantized(x).detach())


@pytest.mark.parametrize("name", ["a.onxx", "a", "a.DWT2"])
def test_unknown_suffixes(quantized, tmp_path, name):
    with pytest.raises(FormatError, match=r"names no file format.*\.dwt"):
        pw.save(quantized, tmp_path / name)
    with pytest.raises(FormatError, match="names no file that can be loaded"):
        pw.load(tmp_path / name)


def test_module_files_need_the_model(quantized, tmp_path):
    path = pw.save(quantized, tmp_path / "a.safetensors")
    with pytest.raises(FormatError, match="needs the float model and one batch"):
        pw.load(path)
    with pytest.raises(FormatError, match="no modules to store"):
        pw.save(pw.lower(quantized, pw.state(quantized).example), tmp_path / "b.safetensors")


def test_prepared_models_are_not_saved_as_modules(cnn, pictures, tmp_path):
    prepared = pw.prepare(cnn, pictures[0])
    with pytest.raises(PennyweightError, match="prepared, not converted"):
        pw.save(prepared, tmp_path / "a.safetensors")


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(10, 8), nn.Linear(8, 3)

    def forward(self, ids, scale=None):
        y = self.head(self.table(ids).mean(1))
        return {"logits": y if scale is None else y * scale, "parts": (y, None)}


def test_dicts_in_and_out(tmp_path):
    torch.manual_seed(0)
    batch = {"ids": torch.randint(0, 10, (2, 6)), "scale": torch.rand(2, 1)}
    quantized = pw.quantize(Named().eval(), [batch], "int8-dynamic")
    session = pw.load(pw.save(quantized, tmp_path / "a.dwt"))
    result = session.run({k: v.numpy() for k, v in batch.items()})
    with torch.no_grad():
        expected = quantized(**batch)
    assert same(result["logits"], expected["logits"])
    assert result["parts"][1] is None


def test_fitted_examples(cnn, pictures):
    program = pw.lower(cnn, torch.cat(pictures))
    batch, arrays = fitted(program, torch.randn(40, 3, 8, 8))
    assert batch[0].shape[0] == 16 == arrays["x"].shape[0]
    batch, _ = fitted(program, torch.randn(1, 3, 8, 8))
    assert batch[0].shape[0] == 1

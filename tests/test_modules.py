"""Module files: the same module again, from the float model and no data."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import pennyweight as pw
from pennyweight.errors import FormatError
from pennyweight.exporters.dwt import write_container
from pennyweight.runtime.container import read_container


class Mixed(nn.Module):
    """Layers of many kinds; `tied` appears twice."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(16, 32)
        self.tied = nn.Linear(32, 32)
        self.again = self.tied
        self.plain = nn.Linear(32, 32, bias=False)
        self.plain.weight = self.tied.weight
        self.norm = nn.LayerNorm(32)
        self.head = nn.Linear(32, 4)
        self.register_buffer("offset", torch.arange(32.0))

    def forward(self, ids):
        x = self.table(ids).mean(1)
        x = self.norm(self.again(torch.relu(self.tied(x))) + self.offset)
        return self.head(torch.relu(self.plain(x)))


def mixed():
    torch.manual_seed(3)
    return Mixed().eval()


IDS = torch.arange(24).reshape(4, 6) % 16


def rebuilt(model, quantized, example, path):
    """Save, then load into another float model of the same structure: nothing may come from the float weights."""
    pw.save(quantized, path)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(torch.randn_like(p))
    return pw.load(path, model=other, example=example)


@pytest.mark.parametrize("recipe", pw.presets())
@pytest.mark.parametrize("kind", ["cnn", "mixed"])
def test_round_trip(cnn, pictures, tmp_path, recipe, kind):
    model, batches = (cnn, pictures) if kind == "cnn" else (mixed(), [IDS])
    quantized = pw.quantize(model, batches, recipe)
    back = rebuilt(model, quantized, batches[0], tmp_path / "a.safetensors")
    assert type(back) is type(quantized)
    with torch.no_grad():
        assert torch.equal(back(batches[0]), quantized(batches[0]))
    assert back.state_dict().keys() == quantized.state_dict().keys()
    for name, tensor in quantized.state_dict().items():
        torch.testing.assert_close(back.state_dict()[name], tensor, rtol=0, atol=0, equal_nan=True)
        assert back.state_dict()[name].dtype == tensor.dtype
    assert pw.state(back).recipe == pw.state(quantized).recipe
    assert pw.journal(back).to_json() == pw.journal(quantized).to_json()
    assert pw.state(back).stage == "converted"


def test_the_float_model_is_left_alone(cnn, pictures, tmp_path):
    path = pw.save(pw.quantize(cnn, pictures), tmp_path / "a.safetensors")
    before = {n: t.clone() for n, t in cnn.state_dict().items()}
    pw.load(path, model=cnn, example=pictures[0])
    assert all(torch.equal(t, before[n]) for n, t in cnn.state_dict().items())


def test_half_precision_layers(tmp_path, cnn, pictures):
    recipe = pw.Recipe.preset("int8").keep("head", dtype="bfloat16")
    quantized = pw.quantize(cnn, pictures, recipe)
    back = rebuilt(cnn, quantized, pictures[0], tmp_path / "a.safetensors")
    assert {t.dtype for t in back.state_dict().values()} >= {torch.bfloat16, torch.int8}
    with torch.no_grad():
        assert torch.equal(back(pictures[0]), quantized(pictures[0]))


def test_what_was_rebuilt_can_be_lowered(cnn, pictures, tmp_path):
    quantized = pw.quantize(cnn, pictures)
    back = rebuilt(cnn, quantized, pictures[0], tmp_path / "a.safetensors")
    a, b = pw.lower(quantized, pictures[0]), pw.lower(back, pictures[0])
    assert str(a) == str(b)
    assert all(np.array_equal(c.data, b.constants[n].data) for n, c in a.constants.items())


def test_shared_tensors_are_stored_once(tmp_path):
    quantized = pw.quantize(mixed(), [IDS], pw.Recipe.preset("int8").keep("plain"))
    container = read_container(pw.save(quantized, tmp_path / "a.safetensors"))
    assert sum(n.startswith(("tied.", "again.")) for n in container.tensors) == len(
        [n for n in container.tensors if n.startswith("tied.")]
    )


@pytest.fixture
def stored(cnn, pictures, tmp_path):
    path = pw.save(pw.quantize(cnn, pictures), tmp_path / "a.safetensors")
    found = read_container(path)
    return path, dict(found.tensors), dict(found.metadata)


def refuses(stored, cnn, pictures, what):
    path, tensors, metadata = stored
    write_container(path, tensors, metadata)
    with pytest.raises(FormatError, match=what) as caught:
        pw.load(path, model=cnn, example=pictures[0])
    assert str(path) in str(caught.value)


def test_missing_tensor(stored, cnn, pictures):
    stored[1].pop("head.codes")
    refuses(stored, cnn, pictures, "'head.codes' is missing.*float model it was made from")


def test_unknown_tensor(stored, cnn, pictures):
    stored[1]["hed.codes"] = stored[1]["head.codes"]
    refuses(stored, cnn, pictures, r"'hed.codes' has no place in this model.*Did you mean 'head.codes'")


def test_tensor_of_another_shape(stored, cnn, pictures):
    stored[1]["head.codes"] = "I8", np.zeros((5, 9), np.int8)
    refuses(stored, cnn, pictures, r"'head.codes' does not fit.*\(5, 9\) stored, \(5, 8\) wanted")


@pytest.mark.parametrize(
    ("key", "value", "what"),
    [
        ("pennyweight.module", "7", "module version '7' is unknown"),
        ("pennyweight.module", None, "holds no converted module"),
        ("pennyweight.recipe", None, "holds no recipe"),
        ("pennyweight.meta", "[1]", "meta is no JSON object"),
        ("pennyweight.meta", '{"aliases": {"a": 1}}', "aliases are no object of names"),
        ("pennyweight.meta", '{"journal": [["a", "b"]]}', "journal is no list"),
        ("pennyweight.meta", '{"aliases": {"nowhere": "head.codes"}}', "'nowhere' has no place"),
    ],
)
def test_metadata(stored, cnn, pictures, key, value, what):
    if value is None:
        stored[2].pop(key)
    else:
        stored[2][key] = value
    refuses(stored, cnn, pictures, what)


def test_another_model(stored, tmp_path):
    with pytest.raises((FormatError, pw.PennyweightError)):
        pw.load(stored[0], model=nn.Sequential(nn.Linear(4, 4)), example=torch.zeros(1, 4))


def test_a_damaged_file(stored, cnn, pictures):
    raw = bytearray(stored[0].read_bytes())
    raw[-1] ^= 1
    stored[0].write_bytes(raw)
    with pytest.raises(FormatError, match="checksum"):
        pw.load(stored[0], model=cnn, example=pictures[0])

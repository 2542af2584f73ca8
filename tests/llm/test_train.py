"""Training with rounding on directories: the loss falls, what is written is what was trained."""

import pytest
import torch
import torch.nn.functional as F

from pennyweight.errors import InputError
from pennyweight.llm.directory import Directory
from pennyweight.llm.load import load, logits
from pennyweight.llm.quantize import quantize
from pennyweight.llm.request import Request
from pennyweight.llm.targets import readers
from pennyweight.llm.train import Training, train


@pytest.fixture(scope="module")
def text():
    """A walk over 32 neighbours, which a model of a few steps can learn something of."""
    steps = torch.randint(0, 2, (2000,), generator=torch.Generator().manual_seed(3))
    return steps.cumsum(0) % 32


def loss(model, ids):
    y = logits(model, ids[:384].view(16, 24))
    return float(F.cross_entropy(y[:, :-1].flatten(0, 1), ids[:384].view(16, 24)[:, 1:].flatten()))


@pytest.mark.parametrize(("lora", "factor"), [(0, 0.7), (4, 0.9)])
def test_the_loss_falls_and_the_directory_is_the_trained_model(llama, text, tmp_path, lora, factor):
    said = []
    request = Training("w4a8", steps=40, lr=3e-3, batch=4, window=24, lora=lora, distill=0.0)
    model = train(llama, tmp_path / "out", request, text, said.append)
    losses = [e["loss"] for e in said if e["what"] == "trained"]
    assert len(losses) == 20 and losses[-1] < factor * losses[0]
    quantize(llama, tmp_path / "plain", Request("w4a8"))
    back = load(tmp_path / "out")
    assert loss(back, text) < factor * loss(load(tmp_path / "plain"), text)
    ids = text[:48].view(2, 24)
    with torch.no_grad():
        want = model.eval()(ids)
    torch.testing.assert_close(logits(back, ids), want, atol=2e-3 * float(want.abs().max()), rtol=0)
    assert sum(hasattr(m, "codes") for m in back.modules()) == 21
    base = load(llama)
    same = torch.equal(back.model.embed_tokens.weight, base.model.embed_tokens.weight)
    assert same == bool(lora)  # beside low ranks nothing but scales learns
    assert not list(tmp_path.glob(".out*"))


def test_low_ranks_change_codes_and_nothing_else(llama, text, tmp_path):
    request = Training("w4a16", steps=10, lr=3e-3, batch=2, window=16, lora=2)
    train(llama, tmp_path / "out", request, text)
    quantize(llama, tmp_path / "plain", Request("w4a16"))
    found, plain = (readers["pennyweight"](Directory(tmp_path / n))[0] for n in ("out", "plain"))
    name = "model.layers.1.mlp.up_proj"
    assert found.keys() == plain.keys()
    assert found[name].weight.spec == plain[name].weight.spec
    base = Directory(llama).floats([f"{name}.weight"])[f"{name}.weight"]
    moved = found[name].weight.dequantize() - base
    assert 0 < float(moved.norm() / base.norm()) < 0.5
    assert not torch.equal(found[name].weight.codes, plain[name].weight.codes)
    kept = [n for n in Directory(tmp_path / "out").names if "norm" in n or "embed" in n or "lm_head" in n]
    for n, tensor in Directory(tmp_path / "out").floats(kept).items():
        assert torch.equal(tensor, Directory(llama).floats([n])[n]), n


def test_training_for_other_files_and_tied_tables(text, tmp_path):
    from tests.llm.conftest import make_llama

    make_llama(tmp_path / "tied", tie_word_embeddings=True)
    request = Training("w4a8", steps=4, lr=1e-3, batch=2, window=16)
    model = train(tmp_path / "tied", tmp_path / "out", request, text)
    back = load(tmp_path / "out")
    assert back.lm_head.weight is back.model.embed_tokens.weight
    ids = text[:24].view(1, 24)
    with torch.no_grad():
        want = model.eval()(ids)
    torch.testing.assert_close(logits(back, ids), want, atol=2e-3 * float(want.abs().max()), rtol=0)
    train(
        tmp_path / "tied", tmp_path / "out.dwt", Training("w4a8", steps=1, batch=1, window=8, to="dwt"), text
    )
    assert (tmp_path / "out.dwt").is_file()


def test_what_cannot_be_trained_is_refused(llama, text, tmp_path):
    for request, words in (
        (Training("nf4"), "scales of integers"),
        (Training("w4a4"), "other than 8 bits"),
        (Training("w4a8", window=4000), "one window needs 4001"),
        (Training("w4a8", lr=0.0), "lr 0.0"),
    ):
        with pytest.raises(InputError, match=words):
            train(llama, tmp_path / "out", request, text)
    quantize(llama, tmp_path / "plain", Request("w4a8"))
    with pytest.raises(InputError, match="quantized already"):
        train(tmp_path / "plain", tmp_path / "out", Training(), text)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["plain"]

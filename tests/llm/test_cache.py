"""Keys and values of a few bits: on their grid, the same token by token, and near what they were."""

import json

import numpy as np
import pytest
import torch
import transformers

from pennyweight.errors import InputError
from pennyweight.llm.block import round_tokens
from pennyweight.llm.cache import cache_bytes, cache_spec, round_cache
from pennyweight.llm.evaluate import generate
from pennyweight.llm.load import load, logits
from pennyweight.llm.quantize import quantize
from pennyweight.llm.request import Request
from pennyweight.llm.schemes import Scheme
from pennyweight.runtime.decode import load_decoding


@pytest.mark.parametrize(("name", "bound"), [("int8", 0.02), ("int4", 0.35)])
def test_what_is_kept_is_rounded(llama, ids, name, bound):
    base, model = load(llama), round_cache(load(llama), name)
    with torch.no_grad():
        want, found = base(ids, use_cache=True), model(ids, use_cache=True)
    first, kept = want.past_key_values.layers[0], found.past_key_values.layers[0]
    scheme = Scheme(cache_spec(name), cache_spec(name))
    for was, now in ((first.keys, kept.keys), (first.values, kept.values)):  # [windows, heads, tokens, width]
        assert torch.equal(now, round_tokens(was, scheme))
        assert not torch.equal(now, was)
    apart = float((found.logits - want.logits).norm() / want.logits.norm())
    assert 0 < apart < bound
    assert torch.equal(logits(model, ids), found.logits)


def test_token_by_token_is_the_window_at_once(llama):
    model = round_cache(load(llama), "int4")
    start = torch.tensor([5, 6, 7, 9])
    made = generate(model, start, tokens=12)
    again = start
    for _ in range(12):
        again = torch.cat([again, logits(model, again[None])[0, -1].argmax()[None]])
    assert torch.equal(made, again)
    assert not torch.equal(made, generate(load(llama), start, tokens=12))


def test_the_directory_says_what_its_cache_is(llama, ids, tmp_path):
    quantize(llama, tmp_path / "out", Request("w8a8", cache="int8"))
    quantize(llama, tmp_path / "without", Request("w8a8"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["cache"] == "int8"
    want = logits(round_cache(load(tmp_path / "without"), "int8"), ids)
    got = logits(load(tmp_path / "out"), ids)
    assert torch.equal(got, want)
    assert not torch.equal(got, logits(load(tmp_path / "without"), ids))


def test_caches_that_cannot_be(llama, tmp_path):
    with pytest.raises(InputError, match="no cache of 'int3'"):
        quantize(llama, tmp_path / "out", Request("w8a8", cache="int3"))
    with pytest.raises(InputError, match="have no place for a cache"):
        quantize(llama, tmp_path / "out", Request("w4a16", cache="int8", to="gguf"))
    with pytest.raises(InputError, match="have no place for a cache"):
        quantize(llama, tmp_path / "out.dwt", Request("w8a8", cache="int4", to="dwt"))
    config = transformers.BertConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=128,
                                     intermediate_size=128)  # fmt: skip
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    with pytest.raises(InputError, match="keeps no keys"):
        quantize(tmp_path / "bert", tmp_path / "out", Request("w8a8", cache="int8"))
    assert [p.name for p in tmp_path.iterdir()] == ["bert"]


def test_bytes_of_a_cache():
    assert cache_bytes("", 10, 2, 4, 16) == 2 * 10 * 2 * 4 * 64
    assert cache_bytes("int8", 10, 2, 4, 16) == 2 * 10 * 2 * 4 * 19
    assert cache_bytes("int4", 10, 2, 4, 16) == 2 * 10 * 2 * 4 * 11


def test_a_program_keeps_what_the_model_rounds(llama, ids, tmp_path):
    quantize(llama, tmp_path / "own", Request("w8a8", cache="int8"))
    quantize(llama, tmp_path / "model.dwt", Request("w8a8", cache="int8", to="dwt"))
    want = logits(load(tmp_path / "own"), ids[:1])[0].numpy()
    decoding = load_decoding(tmp_path / "model.dwt", threads=1)
    assert decoding.rounded
    half = ids.shape[1] // 2
    decoding.step(ids[0, :half].tolist())
    got = decoding.step(ids[0, half:].tolist())
    assert np.abs(got - want[-1]).max() < 5e-3 * np.abs(want).max()

"""Other families than Llama: encoders, blocks without linear layers, norms with a bias, one shared block."""

import json

import numpy as np
import pytest
import torch
import transformers

from pennyweight.errors import GraphError, InputError, NothingQuantized
from pennyweight.llm.evaluate import generate
from pennyweight.llm.load import load, logits
from pennyweight.llm.quantize import quantize
from pennyweight.llm.request import Request
from pennyweight.runtime.decode import load_decoding

SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 128}


def saved(model, folder):
    torch.manual_seed(0)
    model = model.eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                torch.nn.init.normal_(p, std=0.1)
    model.save_pretrained(folder)
    return model


@pytest.fixture
def tokens():
    return torch.arange(8 * 16).view(8, 16) % 128


def test_encoders_are_quantized_like_decoders(tokens, tmp_path):
    config = transformers.BertConfig(intermediate_size=128, **SMALL)
    model = saved(transformers.BertForMaskedLM(config), tmp_path / "bert")
    quantize(tmp_path / "bert", tmp_path / "out", Request("w8a8", method="gptq"), tokens)
    back = load(tmp_path / "out")
    with torch.no_grad():
        want, got = model(tokens).logits, back(tokens).logits
    assert type(back) is type(model)
    assert 0 < float((got - want).norm() / want.norm()) < 0.05
    assert sum(hasattr(m, "codes") for m in back.modules()) == 12


@pytest.mark.parametrize("kind", ["BertForMaskedLM", "BertModel", "BertForSequenceClassification"])
def test_an_encoder_directory_from_the_command_line(kind, tokens, tmp_path, capsys):
    from pennyweight.cli.main import main

    config = transformers.BertConfig(intermediate_size=128, **SMALL)
    model = saved(getattr(transformers, kind)(config), tmp_path / "bert")
    np.save(tmp_path / "text.npy", tokens.numpy())
    words = ["llm", "quantize", str(tmp_path / "bert"), "-o", str(tmp_path / "out"), "--scheme", "w8a8", "--method", "gptq",
             "--calib", str(tmp_path / "text.npy"), "--window", "16", "--verify", str(tmp_path / "text.npy"), "--json"]  # fmt: skip
    assert main(words) == 0
    said = json.loads(capsys.readouterr().out)
    with torch.no_grad():
        want, got = model(tokens)[0], load(tmp_path / "out")(tokens)[0]
    apart = float((got - want).norm() / want.norm())
    assert 0 < apart < 0.05
    assert said["relative error of the result"] == pytest.approx(apart, rel=1e-3)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "gemma", "opt", "phi"])
def test_families_with_biases_other_norms_and_parallel_branches(tokens, tmp_path, kind):
    options = dict(SMALL, intermediate_size=128, num_key_value_heads=2, head_dim=16, ffn_dim=128, word_embed_proj_dim=64,
                   pad_token_id=0, bos_token_id=None, eos_token_id=None)  # fmt: skip
    config = transformers.AutoConfig.for_model(kind, **options)
    model = saved(transformers.AutoModelForCausalLM.from_config(config), tmp_path / "float")
    with torch.no_grad():
        want = model(tokens).logits
        assert torch.allclose(load(tmp_path / "float")(tokens).logits, want, atol=1e-5)
        for name, request in (
            ("gptq", Request("w8a8", method="gptq")),
            ("awq", Request("w8a16", method="awq")),
        ):
            quantize(tmp_path / "float", tmp_path / name, request, tokens)
            got = load(tmp_path / name)(tokens).logits
            assert 0 < float((got - want).norm() / want.norm()) < 0.1, name


@pytest.fixture
def gpt2(tmp_path):
    config = transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=128, n_positions=64,
                                     bos_token_id=None, eos_token_id=None)  # fmt: skip
    return saved(transformers.GPT2LMHeadModel(config), tmp_path / "gpt2")


@pytest.mark.parametrize(
    ("request_", "bound"),
    [
        (Request("w8a8", method="gptq"), 0.05),
        (Request("w4a16", method="awq"), 0.3),
        (Request("w4a8", head="w8a8"), 0.3),
    ],
)
def test_weights_that_a_family_keeps_as_in_by_out(gpt2, tokens, tmp_path, request_, bound):
    with torch.no_grad():
        want = gpt2(tokens).logits
        assert torch.allclose(load(tmp_path / "gpt2")(tokens).logits, want, atol=1e-5)
        quantize(tmp_path / "gpt2", tmp_path / "out", request_, tokens)
        back = load(tmp_path / "out")
        got = back(tokens).logits
    assert 0 < float((got - want).norm() / want.norm()) < bound
    assert sum(hasattr(m, "codes") for m in back.modules()) == 8 + bool(request_.head)
    assert back.transformer.h[0].attn.c_attn.codes.shape[0] == 192  # rows are outputs
    assert generate(back, tokens[0, :4], tokens=4).shape == (8,)


def test_their_decoder_is_one_program(gpt2, tokens, tmp_path):
    quantize(tmp_path / "gpt2", tmp_path / "own", Request("w4a8", head="w8a8"))
    quantize(tmp_path / "gpt2", tmp_path / "out.dwt", Request("w4a8", head="w8a8", to="dwt"))
    want = logits(load(tmp_path / "own"), tokens[:1])[0].numpy()
    decoding = load_decoding(tmp_path / "out.dwt", threads=1)
    for end in range(16):
        got = decoding.step([int(tokens[0, end])])
        assert np.abs(got - want[end]).max() < 2e-3 * np.abs(want).max(), end


def test_files_without_a_place_for_them_say_so(gpt2, tmp_path):
    for to in ("gptq", "compressed-tensors"):
        with pytest.raises(InputError, match=r"keeps as \[in, out\]"):
            quantize(tmp_path / "gpt2", tmp_path / "out", Request("w4a16", to=to))
    assert [p.name for p in tmp_path.iterdir()] == ["gpt2"]


def test_blocks_without_linear_layers_are_refused(tmp_path):
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"
    )
    saved(transformers.ResNetForImageClassification(config), tmp_path / "float")
    with pytest.raises(NothingQuantized, match="Conv2d"):
        quantize(tmp_path / "float", tmp_path / "out", Request("w8a8"))
    assert [p.name for p in tmp_path.iterdir()] == ["float"]


def test_rotation_refuses_norms_with_a_bias(tokens, tmp_path):
    config = transformers.AutoConfig.for_model("phi", intermediate_size=128, **SMALL)
    saved(transformers.AutoModelForCausalLM.from_config(config), tmp_path / "float")
    with pytest.raises(GraphError, match="norms without mean and bias"):
        quantize(tmp_path / "float", tmp_path / "out", Request("w8a8", rotate=True), tokens)

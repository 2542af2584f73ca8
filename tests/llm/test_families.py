"""Other families than Llama: encoders, blocks without linear layers, norms with a bias, one shared block."""

import pytest
import torch
import transformers

from pennyweight.errors import GraphError, NothingQuantized
from pennyweight.llm.load import load
from pennyweight.llm.quantize import quantize
from pennyweight.llm.request import Request

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


def test_blocks_without_linear_layers_are_refused(tokens, tmp_path):
    config = transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=128)
    saved(transformers.GPT2LMHeadModel(config), tmp_path / "gpt2")
    with pytest.raises(NothingQuantized, match="Conv1D"):
        quantize(tmp_path / "gpt2", tmp_path / "out", Request("w8a8"))
    assert [p.name for p in tmp_path.iterdir()] == ["gpt2"]


def test_rotation_refuses_norms_with_a_bias(tokens, tmp_path):
    config = transformers.AutoConfig.for_model("phi", intermediate_size=128, **SMALL)
    saved(transformers.AutoModelForCausalLM.from_config(config), tmp_path / "float")
    with pytest.raises(GraphError, match="norms without mean and bias"):
        quantize(tmp_path / "float", tmp_path / "out", Request("w8a8", rotate=True), tokens)

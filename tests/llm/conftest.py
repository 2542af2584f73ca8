"""A tiny Llama with random weights and a tokenizer of bytes, as directories; text to calibrate on."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="the extra `llm` is not installed")

SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 256, "max_position_embeddings": 256,
}  # fmt: skip


def make_llama(folder, *, seed=0, **options):
    torch.manual_seed(seed)
    settings = {"tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": None, **SIZES, **options}
    config = transformers.LlamaConfig(**settings)
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim > 1:
                torch.nn.init.normal_(p, std=0.15 if "embed" in name else 0.09)
            else:
                p.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    return model


def make_tokenizer(folder):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    reader = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    reader.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    reader.decoder = decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=reader).save_pretrained(folder)


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    """Folder of the model."""
    folder = tmp_path_factory.mktemp("llama") / "tiny"
    make_llama(folder)
    make_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def ids():
    """Calibration windows, int64 [12, 24], of a text with structure."""
    made = torch.Generator().manual_seed(1)
    steps = torch.randint(-3, 4, (12 * 24,), generator=made)
    return (steps.cumsum(0) % 256).view(12, 24)

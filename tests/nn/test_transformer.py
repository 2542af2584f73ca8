"""Transformer stacks of torch.nn: seen inside, quantized inside, and the same after lowering."""

import numpy as np
import pytest
import torch
from torch import nn

import pennyweight as pw
from pennyweight.nn.attention import IntegerMultiheadAttention
from pennyweight.nn.linear import IntegerLinear
from pennyweight.nn.transformer import take_plain_paths
from pennyweight.passes.solve import sqnr
from pennyweight.pipeline import clone, quantize, state
from pennyweight.program.interpret import interpret
from pennyweight.program.lower import lower
from pennyweight.recipe import Recipe

N, T, E = 4, 6, 16
pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")


def random_norms(model):
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.normal_(module.weight, 1, 0.2)
            nn.init.normal_(module.bias, 0, 0.2)
    return model.eval()


def encoder(**options):
    options = {"dim_feedforward": 32, "batch_first": True, **options}
    layer = nn.TransformerEncoderLayer(E, 4, **options)
    return random_norms(nn.TransformerEncoder(layer, 2, enable_nested_tensor=not layer.norm_first))


def padded(n=N, t=T):
    padding = torch.zeros(n, t, dtype=torch.bool)
    padding[0, t - 2 :] = padding[-1, t // 2 :] = True
    return {"src": torch.randn(n, t, E), "src_key_padding_mask": padding}


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize(("recipe", "least"), [("int8", 28), ("int8-dynamic", 36), ("int8-weight", 40)])
def test_encoder_with_padding(recipe, least, norm_first, activation):
    model, batch = encoder(norm_first=norm_first, activation=activation), padded()
    quantized = quantize(model, [batch, padded()], recipe, progress=False)
    keep = ~batch["src_key_padding_mask"]
    want, got = model(**batch)[keep], quantized(**batch)[keep]
    assert not torch.equal(want, got)
    assert sqnr(want, got) > least
    assert float(nn.functional.cosine_similarity(want, got, -1).min()) > 0.99
    assert sum(isinstance(m, IntegerMultiheadAttention) for m in quantized.modules()) == 2
    assert isinstance(quantized.layers[0].linear1, IntegerLinear)
    assert isinstance(quantized, nn.TransformerEncoder)


@pytest.mark.parametrize("recipe", ["int8", "int8-dynamic"])
def test_encoder_program(recipe):
    model = encoder(activation="relu")
    quantized = quantize(model, [padded(), padded()], recipe, progress=False)
    program = lower(quantized, padded())
    for sizes in ((N, T), (2, 11)):
        batch = padded(*sizes)
        got = interpret(program, {n: t.numpy() for n, t in batch.items()})[program.outputs[0]]
        want = quantized(**batch).numpy()
        assert sqnr(torch.from_numpy(want), torch.from_numpy(got)) > 40  # at worst a few codes flip
        assert np.abs(want - got).max() < 0.1
    kinds = {op.kind for op in program.ops}
    assert ("attention" in kinds) == (recipe == "int8")
    assert "linear_f32" not in kinds


def test_layers_are_planned_whatever_the_short_cuts():
    for batch in (padded(), {"src": torch.randn(N, T, E)}):
        plan = state(quantize(encoder(), [batch], "int8", progress=False)).plan
        names = {f"layers.{i}.{m}" for i in range(2) for m in ("self_attn", "linear1", "linear2")}
        assert set(plan.layers) == names


def test_attention_kept_in_float_does_not_reach_for_integer_weights():
    model, batch = encoder(), padded()
    quantized = quantize(model, [batch], Recipe.preset("int8").keep("*.self_attn"), progress=False)
    assert type(quantized.layers[0].self_attn) is nn.MultiheadAttention
    keep = ~batch["src_key_padding_mask"]
    assert sqnr(model(**batch)[keep], quantized(**batch)[keep]) > 28
    program = lower(quantized, batch)
    got = interpret(program, {n: t.numpy() for n, t in batch.items()})[program.outputs[0]]
    assert sqnr(quantized(**batch)[keep], torch.from_numpy(got)[keep]) > 40


def test_recording_sees_through_the_short_cuts():
    graph = pw.record(encoder(), padded())
    assert torch.backends.mha.get_fastpath_enabled()
    names = {node.name for node in graph if node.kind == "module"}
    assert {"layers.1.self_attn", "layers.1.linear2"} <= names
    assert not any("nested" in node.op for node in graph)


def test_the_model_itself_keeps_its_short_cuts():
    model = encoder()
    quantize(model, [padded()], "int8", progress=False)
    assert type(model) is nn.TransformerEncoder
    assert model.use_nested_tensor
    assert model.layers[0].activation_relu_or_gelu == 1


def test_plain_paths_compute_the_same():
    model, batch = encoder(), padded()
    other = clone(model)
    take_plain_paths(other)
    keep = ~batch["src_key_padding_mask"]
    assert torch.allclose(model(**batch)[keep], other(**batch)[keep], atol=1e-5)
    assert list(other.state_dict()) == list(model.state_dict())


class Translator(nn.Module):
    """Encoder and decoder with the mask that everybody makes."""

    def __init__(self):
        super().__init__()
        self.net = nn.Transformer(E, 4, 1, 1, 32, batch_first=True)
        self.out = nn.Linear(E, 5)

    def forward(self, src, tgt):
        mask = nn.Transformer.generate_square_subsequent_mask(tgt.shape[1])
        return self.out(self.net(src, tgt, tgt_mask=mask))


@pytest.mark.parametrize(("recipe", "least"), [("int8", 22), ("int8-dynamic", 32)])
def test_decoder_with_a_causal_mask(recipe, least):
    model = random_norms(Translator())
    batch = (torch.randn(3, 5, E), torch.randn(3, 4, E))
    quantized = quantize(model, [batch], recipe, progress=False)
    want, got = model(*batch), quantized(*batch)
    assert sqnr(want, got) > least
    plan = state(quantized).plan
    assert {"net.decoder.layers.0.self_attn", "net.decoder.layers.0.multihead_attn"} <= set(plan.layers)
    later = batch[1].clone()
    later[:, 3:] += 1  # what comes later changes nothing before
    assert torch.equal(quantized(batch[0], later)[:, :3], got[:, :3])
    program = lower(quantized, batch)
    for src, tgt in (batch, (torch.randn(2, 8, E), torch.randn(2, 4, E))):
        result = interpret(program, {"src": src.numpy(), "tgt": tgt.numpy()})[program.outputs[0]]
        assert sqnr(quantized(src, tgt), torch.from_numpy(result)) > 40


def test_sequence_first_decoder():
    layer = nn.TransformerDecoderLayer(E, 4, 32)
    model = random_norms(nn.TransformerDecoder(layer, 2))
    batch = {"tgt": torch.randn(4, 3, E), "memory": torch.randn(6, 3, E)}
    batch["tgt_mask"] = torch.ones(4, 4, dtype=torch.bool).triu(1)
    batch["memory_key_padding_mask"] = torch.tensor([[False] * 6, [False] * 4 + [True] * 2, [False] * 6])
    quantized = quantize(model, [batch], "int8-dynamic", progress=False)
    assert sqnr(model(**batch), quantized(**batch)) > 32

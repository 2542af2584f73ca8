"""nn.EmbeddingBag: sums, means and maxima of decoded rows."""

import numpy as np
import pytest
import torch
from torch import nn

from pennyweight.errors import InputError, UnrealisableSite
from pennyweight.pipeline import calibrate, prepare, quantize
from pennyweight.program.interpret import interpret
from pennyweight.program.lower import lower


class Model(nn.Module):
    """A bag of words, then a linear layer."""

    def __init__(self, **options):
        super().__init__()
        self.bag, self.fc = nn.EmbeddingBag(20, 8, **options), nn.Linear(8, 3)

    def forward(self, ids, offsets=None, weights=None):
        return self.fc(self.bag(ids, offsets, weights))


MODES = [
    {"mode": "sum"},
    {"mode": "mean"},
    {"mode": "max"},
    {"mode": "sum", "padding_idx": 3},
    {"mode": "mean", "padding_idx": 3},
    {"mode": "max", "padding_idx": 3},
    {"mode": "mean", "include_last_offset": True},
]
ROWS = torch.tensor([[1, 2, 3, 3], [4, 4, 9, 0], [3, 3, 3, 3]])


@pytest.mark.parametrize("recipe", ["int8", "int8-weight", "int4-weight"])
@pytest.mark.parametrize("options", MODES)
def test_same_as_torch_on_the_decoded_table(options, recipe):
    model = Model(**options).eval()
    prepared = prepare(model, ROWS, recipe)
    calibrate(prepared, [ROWS], progress=False)
    table = prepared.bag.solved["weight"].dequantize()
    bag = quantize(model, [ROWS], recipe, progress=False).bag
    plain = nn.EmbeddingBag.from_pretrained(table, **options)
    assert not torch.equal(table, model.bag.weight)
    assert torch.allclose(bag(ROWS), plain(ROWS), atol=1e-6)
    flat = torch.tensor([1, 2, 3, 3, 4, 9, 3])
    offsets = torch.tensor([0, 2, 2, 6, 7] if options.get("include_last_offset") else [0, 2, 2, 6])
    assert torch.allclose(bag(flat, offsets), plain(flat, offsets), atol=1e-6)
    if options["mode"] == "sum":
        weights = torch.rand(ROWS.shape)
        want = plain(ROWS, per_sample_weights=weights)
        assert torch.allclose(bag(ROWS, None, weights), want, atol=1e-6)


@pytest.mark.parametrize("options", MODES)
def test_program(options):
    quantized = quantize(Model(**options).eval(), [ROWS], "int8", progress=False)
    program = lower(quantized, ROWS)
    for ids in (ROWS, torch.tensor([[1, 3], [5, 6]])):
        got = interpret(program, {"ids": ids.numpy()})[program.outputs[0]]
        assert np.allclose(quantized(ids).numpy(), got, atol=2e-2)


def test_errors():
    bag = quantize(Model().eval(), [ROWS], "int8", progress=False).bag
    with pytest.raises(InputError, match=r"offsets.*at bag"):
        bag(torch.tensor([1, 2]))
    with pytest.raises(UnrealisableSite, match=r"max_norm.*at bag"):
        prepare(Model(max_norm=1.0).eval(), ROWS, "int8")

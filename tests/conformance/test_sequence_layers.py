"""Programs of recurrent layers, attention and norms: the engine gives the bits of the reference."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import pennyweight as pw
from pennyweight.errors import KernelError
from pennyweight.program.lower import lower
from pennyweight.runtime.session import Session


@pytest.fixture(autouse=True)
def _inference():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def both(model, recipe, example, *others):
    """Results of engine and reference, for the example and further batches."""
    quantized = pw.quantize(model.eval(), [example], recipe, progress=False)
    program = lower(quantized, example)
    try:
        native = Session(program, backend="native")
    except KernelError as error:
        pytest.skip(f"no native engine: {error.what}")
    reference = Session(program, backend="reference")
    for batch in (example, *others):
        arrays = [t.numpy() for t in tree_leaves(batch) if isinstance(t, torch.Tensor)]
        results = (tree_leaves(s.run(*arrays)) for s in (native, reference))
        yield from zip(*results, strict=True)


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True, "batch_first": True}])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_layers(kind, options):
    model = kind(6, 24, **options)
    others = torch.randn(8, 7, 6), torch.randn(1, 1, 6) * 50
    for got, want in both(model, "int8-dynamic", torch.randn(3, 4, 6), *others):
        assert np.array_equal(got, want)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize("recipe", ["int8-weight", "int4-weight"])
def test_recurrent_layers_in_float(kind, recipe):
    model = kind(6, 32, batch_first=True, bidirectional=True)
    for got, want in both(model, recipe, torch.randn(3, 4, 6), torch.randn(5, 4, 6)):
        assert np.allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("recipe", ["int8", "int8-dynamic"])
def test_transformer(recipe):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            layer = nn.TransformerEncoderLayer(32, 4, 64, activation="gelu", batch_first=True)
            self.stack, self.out = nn.TransformerEncoder(layer, 2), nn.Linear(32, 3)

        def forward(self, x, padding):
            return self.out(self.stack(x, src_key_padding_mask=padding))

    def batch(n, t):
        return torch.randn(n, t, 32), torch.arange(t)[None] >= torch.randint(1, t + 1, (n, 1))

    for got, want in both(Model(), recipe, batch(3, 6), batch(2, 17)):
        if recipe == "int8":
            assert np.array_equal(got, want)
        else:  # scores in float, whose sums have no order: at worst a code flips
            assert np.abs(got - want).max() < 0.02


@pytest.mark.parametrize("make", [nn.LSTMCell, nn.GRUCell])
def test_cells(make):
    for got, want in both(make(6, 24), "int8-dynamic", torch.randn(4, 6), torch.randn(9, 6)):
        assert np.array_equal(got, want)

"""Several quantizers in turn: tables of one, layers of another."""

import pytest
import torch
from torch import nn

import pennyweight as pw
from pennyweight.compat.export import capture_pre_autograd_graph
from pennyweight.compat.quantization.quantize_pt2e import convert_pt2e, prepare_pt2e
from pennyweight.compat.quantization.quantizer import (
    ComposableQuantizer,
    EmbeddingQuantizer,
    QuantizationAnnotation,
    Quantizer,
    XNNPACKQuantizer,
)
from pennyweight.compat.quantization.quantizer.xnnpack_quantizer import get_symmetric_quantization_config

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(20, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, ids):
        return self.head(self.table(ids).mean(1))


def test_tables_and_layers():
    torch.manual_seed(0)
    model, ids = Words().eval(), torch.randint(0, 20, (4, 5))
    layers = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_dynamic=True))
    both = ComposableQuantizer([EmbeddingQuantizer(), layers])
    graph = capture_pre_autograd_graph(model, (ids,))
    graph.meta.clear()  # the batch to plan with is then made up: identities must be rows of the table
    quantized = convert_pt2e(prepare_pt2e(graph, both))
    found = {e.site: e.data["spec"] for e in pw.journal(quantized).of("site")}
    assert found == {"table:weight": "uint8[1,*]+zf", "head:input": "uint8[*]+z", "head:weight": "int8n[*]"}
    with torch.no_grad():
        assert (quantized(ids) - model(ids)).abs().max() < 0.02
    assert pw.interpret(pw.lower(quantized, ids), {"ids": ids.numpy()})


def test_none_may_overrule_another():
    class Rude(Quantizer):
        def annotate(self, model):
            for node in model.graph.nodes:
                if node.op == "call_function":
                    node.meta["quantization_annotation"] = QuantizationAnnotation()
            return model

        def validate(self, model):
            pass

    layers = XNNPACKQuantizer().set_global(get_symmetric_quantization_config())
    graph = capture_pre_autograd_graph(Words().eval(), (torch.zeros(1, 5, dtype=torch.int64),))
    with pytest.raises(pw.errors.PlanError, match="Rude changes what XNNPACKQuantizer annotated"):
        prepare_pt2e(graph, ComposableQuantizer([layers, Rude()]))

"""Settings of `XNNPACKQuantizer`: the most specific one decides."""

import pytest
import torch
from torch import nn

import pennyweight as pw
from pennyweight.compat.export import capture_pre_autograd_graph
from pennyweight.compat.quantization.quantize_pt2e import convert_pt2e, prepare_pt2e
from pennyweight.compat.quantization.quantizer import XNNPACKQuantizer
from pennyweight.compat.quantization.quantizer.xnnpack_quantizer import get_symmetric_quantization_config

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
STATIC, ROWS = get_symmetric_quantization_config(), get_symmetric_quantization_config(is_per_channel=True)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(6, 6)

    def forward(self, x):
        return torch.cat([self.lin(x) * x, x], 1)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = Block()
        self.blocks = nn.Linear(12, 6)  # a name that begins like the other
        self.conv = nn.ConvTranspose1d(6, 2, 1)

    def forward(self, x):
        return self.conv(self.blocks(self.block(x)).relu().unsqueeze(2))


X = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))


def sites(quantizer, model=None, atol=0.05):
    torch.manual_seed(0)
    model = Net().eval() if model is None else model
    prepared = prepare_pt2e(capture_pre_autograd_graph(model, (X,)), quantizer)
    prepared(X)
    quantized = convert_pt2e(prepared)
    with torch.no_grad():
        assert (quantized(X) - model(X)).abs().max() < atol
    return {e.site: e.data["spec"] for e in pw.journal(quantized).of("site")}


def weights(quantizer, model=None, atol=0.05):
    return {
        s.partition(":")[0]: spec
        for s, spec in sites(quantizer, model, atol).items()
        if s.endswith(":weight")
    }


def test_global():
    found = sites(XNNPACKQuantizer().set_global(STATIC))
    assert {s for s in found if s.endswith("weight")} == {"block.lin:weight", "blocks:weight", "conv:weight"}
    assert {":mul/0:0", ":mul/0:1"} <= set(found)
    assert set(found.values()) == {"int8[*]+z", "int8n[*]"}


def test_by_module_name():
    quantizer = XNNPACKQuantizer().set_global(STATIC).set_module_name("block", ROWS)
    assert weights(quantizer) == {"block.lin": "int8n[1,*]", "blocks": "int8n[*]", "conv": "int8n[*]"}
    assert set(weights(quantizer.set_module_name("block", None))) == {"blocks", "conv"}
    assert set(weights(XNNPACKQuantizer().set_module_name("block", STATIC))) == {"block.lin"}


def test_by_module_type():
    quantizer = (
        XNNPACKQuantizer().set_global(STATIC).set_module_type(nn.Linear, ROWS).set_module_type(Block, None)
    )
    found = sites(quantizer)
    assert found["blocks:weight"] == "int8n[1,*]" and found["conv:weight"] == "int8n[*]"
    assert not [s for s in found if s.startswith((":mul",))]
    assert "block.lin:weight" in found  # a linear layer is named before the block is


def test_names_come_before_types_before_operators():
    quantizer = XNNPACKQuantizer().set_operator_type(torch.ops.aten.linear.default, ROWS)
    assert weights(quantizer) == {"block.lin": "int8n[1,*]", "blocks": "int8n[1,*]"}
    assert set(weights(XNNPACKQuantizer().set_operator_type(torch.ops.aten.linear, STATIC))) == {
        "block.lin",
        "blocks",
    }
    quantizer.set_module_type(nn.Linear, STATIC).set_module_name("blocks", ROWS)
    assert weights(quantizer) == {"block.lin": "int8n[*]", "blocks": "int8n[1,*]"}


def test_a_filter():
    quantizer = XNNPACKQuantizer().set_global(STATIC).set_filter_function(lambda n: n.name != "linear_1")
    assert set(weights(quantizer)) == {"block.lin", "conv"}


def test_ranges_of_codes():
    four = get_symmetric_quantization_config(weight_qmin=-8, weight_qmax=7, is_per_channel=True)
    wide = weights(XNNPACKQuantizer().set_module_name("blocks", four), atol=0.3)
    assert wide == {"blocks": "int4[1,*]"}
    assert get_symmetric_quantization_config(act_qmin=-128).input_activation.quant_max == 127


def test_scalars_are_passed_over():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.l = nn.Linear(6, 3)

        def forward(self, x):
            return self.l(x) * 2 + 1

    assert set(sites(XNNPACKQuantizer().set_global(STATIC), Scaled().eval())) == {"l:input", "l:weight"}

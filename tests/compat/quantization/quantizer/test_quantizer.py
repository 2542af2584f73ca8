"""A user's own quantizer: what it annotates, on edges, results and by reference, is what is made."""

import dataclasses
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pennyweight as pw
from pennyweight.compat.export import capture_pre_autograd_graph
from pennyweight.compat.quantization.quantize_pt2e import convert_pt2e, prepare_pt2e, prepare_qat_pt2e
from pennyweight.compat.quantization.quantizer import (
    DerivedQuantizationSpec,
    FixedQParamsQuantizationSpec,
    QuantizationAnnotation,
    QuantizationSpec,
    Quantizer,
    SharedQuantizationSpec,
)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
aten = torch.ops.aten


class MinMaxObserver:
    """Stands for any observer: only its name is read."""

    @classmethod
    def with_args(cls, **options):
        return functools.partial(cls, **options)


UINT8 = QuantizationSpec(torch.uint8, MinMaxObserver.with_args(eps=1e-5), 0, 255, torch.per_tensor_affine)
INT8 = QuantizationSpec(torch.int8, MinMaxObserver, -128, 127, torch.per_tensor_symmetric)
WEIGHT = QuantizationSpec(torch.int8, MinMaxObserver, -127, 127, torch.per_channel_symmetric, ch_axis=0)
BIAS = QuantizationSpec(torch.float32, MinMaxObserver)


class Own(Quantizer):
    """Calls `rule(node)` on every call of a function; what it returns is the annotation."""

    def __init__(self, rule):
        self.rule, self.validated = rule, False

    def annotate(self, model):
        for node in model.graph.nodes:
            found = self.rule(node) if node.op == "call_function" else None
            if found is not None:
                node.meta["quantization_annotation"] = found
        return model

    def validate(self, model):
        self.validated = True


def layer(node, activation=UINT8, weight=WEIGHT, output=None):
    """The annotation of a layer, as tutorials write it."""
    inputs = {node.args[0]: activation, node.args[1]: weight}
    if len(node.args) > 2 and node.args[2] is not None:
        inputs[node.args[2]] = BIAS
    return QuantizationAnnotation(
        input_qspec_map={k: v for k, v in inputs.items() if v is not None},
        output_qspec=output,
        _annotated=True,
    )


LAYERS = (aten.conv2d.default, aten.linear.default)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.gate = nn.Linear(64, 8)
        self.value = nn.Linear(64, 8)
        self.out = nn.Linear(8, 3)

    def forward(self, x):
        x = F.relu(self.conv(x)).flatten(1)
        return self.out(torch.sigmoid(self.gate(x)) * self.value(x))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().eval()


X = torch.randn(16, 1, 6, 6, generator=torch.Generator().manual_seed(0))


def made(net, rule, prepare=prepare_pt2e, x=X):
    quantizer = Own(rule)
    prepared = prepare(capture_pre_autograd_graph(net, (x,)), quantizer)
    assert quantizer.validated
    prepared(x)
    return convert_pt2e(prepared.eval())


def sites(model):
    return {event.site: event.data["spec"] for event in pw.journal(model).of("site")}


def test_layers(net):
    model = made(net, lambda n: layer(n) if n.target in LAYERS else None)
    assert sites(model) == {
        f"{name}:{what}": spec
        for name in ("conv", "gate", "value", "out")
        for what, spec in (("input", "uint8[*]+z"), ("weight", "int8n[1,*]"))
    }
    with torch.no_grad():
        assert (model(X) - net(X)).abs().max() < 0.02
    assert model.gate.x_scale == model.value.x_scale  # equal values share one scale


def test_different_specs_in_one_model(net):
    by_name = {
        "conv2d": {"activation": INT8},
        "linear": {"weight": dataclasses.replace(WEIGHT, quant_min=-8, quant_max=7)},
        "linear_1": {"activation": None},
    }
    found = sites(made(net, lambda n: layer(n, **by_name[n.name]) if n.name in by_name else None))
    assert found == {
        "conv:input": "int8[*]", "conv:weight": "int8n[1,*]", "gate:input": "uint8[*]+z", "gate:weight": "int4[1,*]",
        "value:weight": "int8n[1,*]",
    }  # fmt: skip


def test_a_spec_of_a_result_is_that_of_its_readers_through_views_and_clips(net):
    def rule(node):
        if node.target == aten.conv2d.default:
            return layer(node, output=INT8)
        return layer(node, activation=None) if node.target == aten.linear.default else None

    found = sites(made(net, rule))
    assert found["gate:input"] == found["value:input"] == "int8[*]"  # conv -> relu -> flatten -> both
    assert "out:input" not in found and found["out:weight"] == "int8n[1,*]"


def test_operations_between_layers_and_partial_annotations(net):
    def rule(node):
        if node.target == aten.mul.Tensor:
            return QuantizationAnnotation(dict.fromkeys(node.args, UINT8), _annotated=True)
        if node.target == aten.sigmoid.default:
            return QuantizationAnnotation({node.args[0]: UINT8})
        return layer(node) if node.target in LAYERS else None

    assert {":mul/0:0", ":mul/0:1", ":sigmoid/0:0"} <= set(sites(made(net, rule)))

    def half(node):
        if node.target == aten.mul.Tensor:
            return QuantizationAnnotation({node.args[0]: UINT8})
        return layer(node) if node.target in LAYERS else None

    model = made(net, half)
    assert not [s for s in sites(model) if s.startswith(":mul")]
    reasons = {e.site: e.data["reason"] for e in pw.journal(model).of("kept")}
    assert "operand" in reasons[":mul/0"]


@pytest.mark.parametrize("prepare", [prepare_pt2e, prepare_qat_pt2e])
def test_shared_specs_share_a_scale(net, prepare):
    def rule(node):
        if node.target == aten.mul.Tensor:
            first, second = node.args
            return QuantizationAnnotation({first: UINT8, second: SharedQuantizationSpec((first, node))})
        return layer(node) if node.target in LAYERS else None

    call = made(net.train(), rule, prepare)._pw_calls["mul/0"]
    assert call.scale_0 == call.scale_1 and call.zero_0 == call.zero_1
    apart = made(net, lambda n: layer(n) if n.target in LAYERS else QuantizationAnnotation(
        dict.fromkeys(n.args, UINT8)) if n.target == aten.mul.Tensor else None, prepare)._pw_calls["mul/0"]  # fmt: skip
    assert apart.scale_0 != apart.scale_1


@pytest.mark.parametrize("prepare", [prepare_pt2e, prepare_qat_pt2e])
def test_fixed_parameters_are_taken_as_they_are(net, prepare):
    fixed = FixedQParamsQuantizationSpec(torch.uint8, 1 / 256, 0, 0, 255, torch.per_tensor_affine)

    def rule(node):
        if node.target == aten.sigmoid.default:
            return QuantizationAnnotation({node.args[0]: UINT8}, fixed)
        if node.target == aten.mul.Tensor:
            return QuantizationAnnotation({node.args[1]: UINT8})  # the other operand has the sigmoid's
        return layer(node) if node.target in LAYERS else None

    call = made(net.train(), rule, prepare)._pw_calls["mul/0"]
    assert (float(call.scale_0), float(call.zero_0)) == (1 / 256, 0)
    assert float(call.scale_1) != 1 / 256


def test_derived_biases_are_no_matter_and_other_derived_specs_are_refused(net):
    def derived(node, of):
        pair = [(node.args[0], node), (node.args[1], node)]
        spec = DerivedQuantizationSpec(
            pair, lambda both: both, torch.int32, qscheme=torch.per_channel_symmetric
        )
        return QuantizationAnnotation({node.args[0]: UINT8, node.args[1]: WEIGHT, node.args[of]: spec})

    model = made(net, lambda n: derived(n, 2) if n.target in LAYERS else None)
    assert model.out.bias.dtype == torch.int32
    with pytest.raises(pw.errors.UnrealisableSite, match="bias"):
        made(net, lambda n: derived(n, 0) if n.target in LAYERS else None)


def test_dynamic_and_half_specs(net):
    dynamic = dataclasses.replace(INT8, is_dynamic=True)
    half = QuantizationSpec(torch.float16)

    def rule(node):
        if node.name == "linear":
            return layer(node, dynamic)
        return layer(node, None, half) if node.name == "linear_1" else None

    model = made(net, rule)
    assert (model.gate.mode, model.value.weight.dtype) == ("dynamic", torch.float16)


def test_annotations_of_other_packages_are_read_by_their_names(net):
    @dataclasses.dataclass
    class Foreign:
        input_qspec_map: dict
        output_qspec: object = None

    shared = dataclasses.make_dataclass("SharedQuantizationSpec", ["edge_or_node"])

    def rule(node):
        if node.target == aten.mul.Tensor:
            return Foreign({node.args[0]: UINT8, node.args[1]: shared((node.args[0], node))})
        return Foreign({node.args[0]: UINT8, node.args[1]: WEIGHT}) if node.target in LAYERS else None

    call = made(net, rule)._pw_calls["mul/0"]
    assert call.scale_0 == call.scale_1


def test_a_graph_is_rewritten_before_it_is_annotated(net):
    class Tanh(Own):
        def transform_for_annotation(self, model):
            for node in list(model.graph.nodes):
                if node.target == aten.sigmoid.default:
                    node.target = aten.tanh.default
            model.recompile()
            return model

    prepared = prepare_pt2e(
        capture_pre_autograd_graph(net, (X,)), Tanh(lambda n: layer(n) if n.target in LAYERS else None)
    )
    prepared(X)
    with torch.no_grad():
        x = F.relu(net.conv(X)).flatten(1)
        want = net.out(torch.tanh(net.gate(x)) * net.value(x))
        assert (convert_pt2e(prepared)(X) - want).abs().max() < 0.02


@pytest.mark.parametrize(
    ("annotation", "says"),
    [
        ({"activation": dataclasses.replace(UINT8, dtype=torch.float8_e4m3fn)}, "float8"),
        (
            {"activation": dataclasses.replace(UINT8, qscheme=torch.per_channel_affine)},
            "one scale per tensor",
        ),
        ({"weight": dataclasses.replace(WEIGHT, ch_axis=1)}, "ch_axis=0"),
        ({"weight": dataclasses.replace(WEIGHT, qscheme=torch.per_tensor_affine)}, "no zero point"),
        ({"weight": dataclasses.replace(WEIGHT, quant_min=-100, quant_max=50)}, "-100"),
        ({"activation": dataclasses.replace(UINT8, quant_max=2**20)}, "grid"),
    ],
)
def test_what_cannot_be_had_is_refused_with_its_place(net, annotation, says):
    with pytest.raises(pw.errors.UnrealisableSite, match=says) as caught:
        made(net, lambda n: layer(n, **annotation) if n.name == "linear_2" else None)
    assert caught.value.site.startswith("out") and caught.value.hint


def test_operands_of_one_operation_need_one_spec(net):
    with pytest.raises(pw.errors.UnrealisableSite, match="mul"):
        made(net, lambda n: QuantizationAnnotation(dict(zip(n.args, (UINT8, INT8), strict=True)))
             if n.target == aten.mul.Tensor else None)  # fmt: skip


def test_specs_check_themselves():
    with pytest.raises(ValueError, match="quant_min"):
        QuantizationSpec(torch.int8, MinMaxObserver, 5, 2)
    with pytest.raises(ValueError, match="axis"):
        QuantizationSpec(torch.int8, MinMaxObserver, ch_axis=-1)
    with pytest.raises(TypeError):
        Quantizer()


def test_the_range_rule_is_that_of_the_observers(net):
    def rules(name):
        observer = type(name, (), {})
        spec = dataclasses.replace(UINT8, observer_or_fake_quant_ctr=observer)
        model = made(net, lambda n: layer(n, spec) if n.target in LAYERS else None)
        return {e.data["rule"] for e in pw.journal(model).of("range")}

    assert rules("MinMaxObserver") == {"minmax"}
    assert rules("HistogramObserver") == {"mse"}
    assert rules("MovingAverageMinMaxObserver") == {"moving_minmax"}
    assert rules("SomethingOfMyOwn") == {"minmax"}

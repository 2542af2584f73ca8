"""Ten planted faults: the right cause comes first. Each fault is made as users make it; the code sees the model alone."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pennyweight as pw
from pennyweight.diagnose import causes
from pennyweight.errors import InputError, PennyweightError
from pennyweight.journal import Journal
from pennyweight.passes.calibrate import quantizers
from pennyweight.pipeline import calibrate, convert, prepare
from pennyweight.plan import Rule
from pennyweight.qtensor import QParams
from pennyweight.recipe import Recipe
from pennyweight.spec import QuantSpec


class Net(nn.Module):
    """A small residual network whose logits are means over the image, as SqueezeNet's are."""

    def __init__(self, width=16):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.depth = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.point = nn.Conv2d(width, width, 1)
        self.head = nn.Conv2d(width, 10, 1)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(x + self.point(F.relu(self.depth(x))))
        return self.head(x).mean((2, 3))


@pytest.fixture
def net():
    torch.manual_seed(0)
    model = Net()
    with torch.no_grad():
        model.train()
        for seed in range(8):
            model(images(16, seed))
    return model.eval()


def images(count, seed, scale=1.0):
    return scale * torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def batches(scale=1.0, first=100):
    return [images(16, first + i, scale) for i in range(4)]


def diagnosed(model, quantized, data=None, **options):
    found = pw.diagnose(model, quantized, data or batches(first=200), progress=False, **options)
    assert found.first is not None
    return found


def int8(model, data=None, recipe="int8"):
    return pw.quantize(model, data or batches(), recipe, progress=False)


def ranged(model, site, factor, recipe="int8"):
    """Quantized with the range of one site so many times as wide as it should be."""
    prepared = calibrate(prepare(model, batches()[0], recipe), batches(), progress=False)
    (quantizer,) = [q for s, q in quantizers(prepared).items() if site in s]
    zero = quantizer.zero if factor < 1 else torch.round(quantizer.zero / factor)
    quantizer.set(QParams(quantizer.scale * factor, zero))
    return convert(prepared)


def test_a_sound_model_has_no_cause_of_lost_accuracy(net):
    found = pw.diagnose(net, int8(net), batches(first=200), progress=False)
    specific = [f for f in found.findings if f.cause != "sensitive layer" and (f.gain_db or 0) >= 1]
    assert specific == []
    assert found.sqnr_db > 25
    assert {r["layer"] for r in found.layers} >= {"stem", "depth", "point", "head"}


def test_fault_1_outlier_channel(net):
    with (
        torch.no_grad()
    ):  # rescaled so that the function stays the same: one channel's weights are 200 times as large
        net.depth.weight[5] *= 200
        net.depth.bias[5] *= 200
        net.point.weight[:, 5] /= 200
    per_tensor = Recipe.preset("int8").with_rules(
        Rule("depth", weight=QuantSpec.parse("int8n[*]"), input=QuantSpec.parse("uint8[*]+z"))
    )
    found = diagnosed(net, int8(net, recipe=per_tensor))
    assert (found.first.cause, found.first.site) == ("outlier channel", "depth:weight")
    assert found.first.gain_db > 1


def test_fault_2_outlier_channel_in_activations(net):
    with (
        torch.no_grad()
    ):  # the function stays the same, one channel between the layers is 300 times the others
        net.depth.weight[3] *= 300
        net.depth.bias[3] *= 300
        net.point.weight[:, 3] /= 300
    found = diagnosed(net, int8(net))
    assert (found.first.cause, found.first.site) == ("outlier channel in activations", "point:input")
    assert found.first.gain_db > 3


def test_fault_3_dead_range(net):
    """One broken value at one place while calibrating, ranged by min-max."""
    found = diagnosed(net, ranged(net, "point:input", 40))
    assert (found.first.cause, found.first.site) == ("dead range", "point:input")
    assert found.first.gain_db > 3


def test_fault_4_saturated_range(net):
    """A range rule that clips far too much at one place."""
    found = diagnosed(net, ranged(net, "depth:input", 0.2))
    assert (found.first.cause, found.first.site) == ("saturated range", "depth:input")
    assert found.first.gain_db > 3


def test_fault_5_clipped_logits(net):
    recipe = Recipe.preset("int8").with_rules(
        Rule(types=("mean",), weight=QuantSpec.parse("int8n[1,*]"), input=QuantSpec.parse("uint8[*]+z"))
    )
    found = diagnosed(net, ranged(net, "mean", 0.25, recipe))
    assert found.first.cause == "clipped logits"
    assert "mean" in found.first.site
    assert found.first.gain_db > 3


def test_fault_6_calibration_data_unlike_the_inputs(net):
    quantized = int8(net, batches(scale=0.15))  # calibrated on images that were scaled twice
    found = diagnosed(net, quantized)
    assert (found.first.cause, found.first.site) == ("calibration data unlike the inputs", "stem:input")
    assert found.first.gain_db > 3


def test_fault_6_also_when_they_were_too_large(net):
    quantized = int8(net, batches(scale=60.0))  # calibrated on 0 .. 255, run on normalised images
    found = diagnosed(net, quantized)
    assert found.first.cause == "calibration data unlike the inputs"


def test_fault_7_batch_norm_mismatch(net):
    before = copy.deepcopy(net)
    with torch.no_grad():  # quantized with stale running statistics
        before.norm.running_var *= 4
        before.norm.running_mean += 0.5
    found = diagnosed(net, int8(before))
    assert (found.first.cause, found.first.site) == ("batch-norm mismatch", "norm")
    assert found.first.gain_db > 3


def test_fault_7_also_when_float_is_left_in_train_mode(net):
    quantized = int8(net)
    skewed = [x + 2 for x in batches(first=200)]
    found = pw.diagnose(net.train(), quantized, skewed, progress=False)
    assert found.first.cause == "batch-norm mismatch"


def test_fault_8_bias_too_large_for_its_scale(net):
    with torch.no_grad():  # a channel that training has switched off, but for its bias
        net.point.weight[2] = 1e-12 * torch.randn_like(net.point.weight[2])
        net.point.bias[2] = 3.0
    quantized = int8(net)
    found = diagnosed(net, quantized)
    assert (found.first.cause, found.first.site) == ("bias too large for its scale", "point:bias")


def test_fault_8_also_where_a_runtime_has_clamped_it(net):
    with torch.no_grad():
        net.point.weight[2] = 1e-12 * torch.randn_like(net.point.weight[2])
        net.point.bias[2] = 3.0
    quantized = int8(net)
    unit = quantized.point.x_scale.double() * quantized.point.scale.double()
    codes = torch.round(quantized.point.bias.double() / unit)
    quantized.point.bias = codes.clamp(-(2**31) + 1, 2**31 - 1).to(torch.int32)
    found = diagnosed(net, quantized)
    assert (found.first.cause, found.first.site) == ("bias too large for its scale", "point:bias")
    assert found.first.gain_db > 1


def test_fault_9_overflow_without_vnni(net):
    with torch.no_grad():  # neighbouring weights of one sign and full size on inputs that are all positive
        net.point.weight.copy_(0.2 + 0.01 * torch.randn_like(net.point.weight))
        net.depth.weight *= 0.2
        net.depth.bias += 3.0
    quantized = int8(net)
    found = diagnosed(net, quantized, target="no-vnni")
    assert found.first.cause == "overflow without VNNI"
    assert "point:weight" in {f.site for f in found.findings}
    assert found.first.gain_db > 3
    here = pw.diagnose(net, quantized, batches(first=200), progress=False)
    assert all(f.cause != "overflow without VNNI" for f in here.findings)


def test_fault_10_float_operation_between_integer_ones():
    class Sine(Net):
        def forward(self, x):
            x = F.relu(self.norm(self.stem(x)))
            x = torch.sin(self.depth(x))  # there is no integer sine
            return self.head(F.relu(self.point(x))).mean((2, 3))

    torch.manual_seed(1)
    model = Sine().eval()
    found = diagnosed(model, int8(model))
    assert found.first.cause == "float operation between integer ones"
    assert "sin" in found.first.site


def test_fault_10_also_where_a_rule_keeps_a_layer(net):
    found = diagnosed(net, int8(net, recipe=Recipe.preset("int8").keep("depth")))
    assert (found.first.cause, found.first.site) == ("float operation between integer ones", "depth")
    assert found.first.gain_us is not None


def test_what_it_says_can_be_printed_stored_and_read(net):
    log = Journal()
    found = diagnosed(net, ranged(net, "point:input", 40), journal=log)
    text = str(found)
    assert "1. dead range at point:input" in text
    assert "dB when tried" in text
    assert log.of("finding")[0].data["cause"] == "dead range"
    assert len(log.of("diagnosed")) == len(found.layers)
    assert found.to_dict()["findings"][0]["site"] == "point:input"
    assert Journal.from_json(log.to_json()).of("finding")


def test_the_models_are_left_alone(net):
    quantized = int8(net)
    before = [v.clone() for m in (net, quantized) for v in m.state_dict().values()]
    x = images(4, 7)
    with torch.no_grad():
        outputs = net(x), quantized(x)
    pw.diagnose(net, quantized, batches(first=200), progress=False)
    after = [v for m in (net, quantized) for v in m.state_dict().values()]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    with torch.no_grad():
        assert torch.equal(net(x), outputs[0])
        assert torch.equal(quantized(x), outputs[1])


def test_every_cause_says_what_it_is():
    assert len(causes) >= 8
    assert all(causes[name].__doc__ for name in causes)


def test_what_cannot_be_diagnosed_is_refused(net):
    quantized = int8(net)
    with pytest.raises(InputError, match="Did you mean 'no-vnni'"):
        pw.diagnose(net, quantized, batches(), target="no-vni")
    with pytest.raises(InputError, match="no batch"):
        pw.diagnose(net, quantized, [])
    with pytest.raises(PennyweightError):
        pw.diagnose(net, net, batches())

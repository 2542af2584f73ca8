"""The eager face: old calls, today's results."""

import copy
import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pennyweight as pw
import pennyweight.compat.quantization as tq
from pennyweight.compat.nn.intrinsic import qat as intrinsic_qat
from pennyweight.compat.nn.quantized import FloatFunctional
from pennyweight.errors import EmptyCalibration, InputError, PennyweightError
from pennyweight.nn.fake import ActivationQuantizer
from pennyweight.nn.live_norm import LiveNorm

BACKENDS = ["fbgemm", "x86", "onednn", "qnnpack", "xnnpack"]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.quant, self.dequant = tq.QuantStub(), tq.DeQuantStub()
        self.conv1, self.bn1, self.relu1 = nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8, momentum=0.07), nn.ReLU()
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.sum = FloatFunctional()
        self.drop, self.fc = nn.Dropout(0.2), nn.Linear(8, 4)

    def forward(self, x):
        x = self.relu1(self.bn1(self.conv1(self.quant(x))))
        x = self.sum.add_relu(self.bn2(self.conv2(x)), x)
        return self.dequant(self.fc(self.drop(x.mean((2, 3)))))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def batch():
    torch.manual_seed(1)
    y = torch.arange(32) % 4
    return torch.randn(32, 1, 8, 8) + y.view(-1, 1, 1, 1), y


def learn(model, batch, steps=15):
    optimizer = torch.optim.SGD(model.parameters(), 0.05, 0.9)
    for _ in range(steps):
        loss = F.cross_entropy(model(batch[0]), batch[1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float(loss.detach())


@pytest.mark.parametrize("backend", BACKENDS)
def test_training_end_to_end(net, batch, backend, tmp_path):
    before = F.cross_entropy(net(batch[0]), batch[1])
    net.qconfig = tq.get_default_qat_qconfig(backend)
    fused = tq.fuse_modules_qat(net, [["conv1", "bn1", "relu1"], ["conv2", "bn2"]])
    prepared = tq.prepare_qat(fused)
    assert learn(prepared, batch) < float(before.detach())
    assert prepared.bn1.momentum == 0.07
    prepared.eval()
    converted = tq.convert(prepared)
    with torch.no_grad():
        assert torch.allclose(converted(batch[0]), prepared(batch[0]), atol=0.05)
        state = converted.state_dict()
        assert {type(v) for v in state.values()} == {torch.Tensor}
        assert state["conv1.codes"].dtype == torch.int8
        saved = io.BytesIO()
        torch.save(state, saved)
        saved.seek(0)
        other = tq.prepare_qat(tq.fuse_modules_qat(copy.deepcopy(net).train(), [["conv1", "bn1", "relu1"]]))
        other(batch[0])
        other = tq.convert(other.eval())
        other.load_state_dict(torch.load(saved, weights_only=True))
        assert torch.equal(other(batch[0]), converted(batch[0]))
    pw.save(converted, tmp_path / "a.dwt", example=batch[0])
    np.testing.assert_allclose(
        pw.load(tmp_path / "a.dwt")(batch[0].numpy()), converted(batch[0]).detach().numpy(), atol=0.05
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_calibration_end_to_end(net, batch, backend):
    net.eval()
    net.qconfig = tq.get_default_qconfig(backend)
    fused = tq.fuse_modules(net, [["conv1", "bn1", "relu1"], ["conv2", "bn2"]])
    assert isinstance(fused.bn1, nn.Identity)
    with torch.no_grad():
        assert torch.allclose(fused(batch[0]), net(batch[0]), atol=1e-5)
        prepared = tq.prepare(fused)
        for part in batch[0].split(8):
            prepared(part)
        converted = tq.convert(prepared)
        error = (converted(batch[0]) - net(batch[0])).abs().max()
    assert error < 0.1
    assert net.conv1.weight.requires_grad  # the model given is left as it is


def test_optimizer_made_before_the_first_forward_trains_it(net, batch):
    net.qconfig = tq.get_default_qat_qconfig("x86")
    prepared = tq.prepare_qat(net, inplace=True)
    assert prepared is net
    optimizer = torch.optim.SGD(prepared.parameters(), 0.1)
    weight = prepared.conv1.weight
    before = weight.detach().clone()
    F.cross_entropy(prepared(batch[0]), batch[1]).backward()
    optimizer.step()
    assert prepared.conv1.weight is weight
    assert not torch.equal(weight, before)
    assert {id(p) for p in prepared.parameters()} == {
        id(p) for g in optimizer.param_groups for p in g["params"]
    }


def test_switches_work_before_and_after_the_first_forward(net, batch):
    net.qconfig = tq.get_default_qat_qconfig("x86")
    prepared = tq.prepare_qat(net)
    prepared.apply(tq.disable_fake_quant)
    prepared.apply(intrinsic_qat.freeze_bn_stats)
    prepared.drop.p = 0.0
    net.drop.p = 0.0
    net.bn1.eval()
    net.bn2.eval()
    with torch.no_grad():
        assert torch.allclose(prepared(batch[0]), net(batch[0]), atol=1e-5)
        assert all(m.frozen for m in prepared.modules() if isinstance(m, LiveNorm))
        prepared.apply(tq.enable_fake_quant)
        assert not torch.equal(prepared(batch[0]), net(batch[0]))
        prepared.apply(tq.disable_observer)
        found = {m.site: float(m.scale) for m in prepared.modules() if isinstance(m, ActivationQuantizer)}
        prepared(batch[0] * 9)
        assert found == {
            m.site: float(m.scale) for m in prepared.modules() if isinstance(m, ActivationQuantizer)
        }
        prepared.apply(tq.enable_observer)
        prepared(batch[0] * 9)
        assert found != {
            m.site: float(m.scale) for m in prepared.modules() if isinstance(m, ActivationQuantizer)
        }
        prepared.apply(intrinsic_qat.update_bn_stats)
        assert not any(m.frozen for m in prepared.modules() if isinstance(m, LiveNorm))


def test_a_state_dict_comes_before_any_input(net, batch):
    """Resuming a training, and loading a converted model: neither has data at hand."""
    net.qconfig = tq.get_default_qat_qconfig("x86")
    trained = tq.prepare_qat(net)
    learn(trained, batch, 3)
    resumed = nn.ModuleDict({"inside": tq.prepare_qat(net)})  # as a wrapper of modules does
    resumed.load_state_dict({f"inside.{k}": v for k, v in trained.state_dict().items()})
    trained.eval()
    resumed.eval()
    with torch.no_grad():
        assert torch.equal(resumed["inside"](batch[0]), trained(batch[0]))
    done = tq.convert(trained)
    loaded = tq.convert(tq.prepare_qat(net))
    loaded.load_state_dict(done.state_dict())
    alone = tq.prepare_qat(net)
    alone.load_state_dict(trained.state_dict())
    net.eval()
    net.qconfig = tq.get_default_qconfig("x86")
    calibrated = tq.prepare(net)
    calibrated(batch[0])
    calibrated = tq.convert(calibrated)
    other = tq.convert(tq.prepare(net))
    other.load_state_dict(calibrated.state_dict())
    with torch.no_grad():
        one = batch[0][:1]
        assert torch.equal(loaded(one), done(one))
        assert torch.equal(tq.convert(alone)(one), done(one))
        assert torch.equal(other(one), calibrated(one))
    wrong = tq.convert(tq.prepare_qat(net.train()))
    wrong.load_state_dict({"conv9.codes": torch.zeros(1)})
    with pytest.raises(RuntimeError, match="conv9"):
        wrong(batch[0])


def test_hooks_of_the_users_run_once_around_the_first_forward(net, batch):
    net.eval()
    net.qconfig = tq.get_default_qconfig("x86")
    net.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    net.register_forward_hook(lambda module, args, result: result + 1)
    with torch.no_grad():
        wanted = net(batch[0])
        assert torch.allclose(tq.prepare(net)(batch[0]), wanted, atol=1e-5)
        prepared = tq.prepare(net)
        prepared.forward(batch[0])  # nothing is left open by a call past the hooks
        assert torch.allclose(prepared(batch[0]), wanted, atol=1e-5)


def test_a_failed_first_forward_leaves_the_model_waiting(net, batch):
    net.qconfig = tq.get_default_qat_qconfig("x86")
    prepared = tq.prepare_qat(net)
    with pytest.raises(RuntimeError, match="channels"):
        prepared(torch.randn(2, 3, 8, 8))
    prepared(batch[0])
    assert pw.state(prepared).stage == "prepared"
    assert not prepared._forward_pre_hooks_with_kwargs


def test_layers_without_a_qconfig_stay_float(net, batch):
    net.qconfig = tq.get_default_qat_qconfig("x86")
    net.fc.qconfig = None
    prepared = tq.prepare_qat(net)
    prepared(batch[0])
    converted = tq.convert(prepared.eval())
    assert type(converted.fc) is nn.Linear
    assert type(converted.conv1).__name__ == "IntegerConv"


def test_one_call_forms(net, batch):
    net.qconfig = tq.get_default_qconfig("x86")
    done = tq.quantize(net, lambda model, x: model(x), (batch[0],))
    assert type(done.conv1).__name__ == "IntegerConv"
    net.qconfig = tq.get_default_qat_qconfig("x86")
    done = tq.quantize_qat(net, lambda model, b: learn(model, b, 2), (batch,))
    assert type(done.fc).__name__ == "IntegerLinear"


def test_dynamic():
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {"rnn": nn.LSTM(8, 8, batch_first=True), "fc": nn.Linear(8, 4), "other": nn.Linear(8, 4)}
    )
    done = tq.quantize_dynamic(model, {nn.LSTM, nn.Linear}, dtype=torch.qint8)
    assert [type(m).__name__ for m in done.values()] == ["IntegerSequence", "IntegerLinear", "IntegerLinear"]
    done = tq.quantize_dynamic(model, {"fc"}, dtype=torch.qint8)
    assert [type(m).__name__ for m in done.values()] == ["LSTM", "IntegerLinear", "Linear"]
    half = tq.quantize_dynamic(model, dtype=torch.float16)
    assert half["fc"].weight.dtype == torch.float16
    x = torch.randn(3, 8)
    assert torch.allclose(done["fc"](x), model["fc"](x), atol=0.05)
    with pytest.raises(InputError, match="qint32"):
        tq.quantize_dynamic(model, dtype=torch.qint32)


def test_observer_states_travel(net, batch):
    net.qconfig = tq.get_default_qat_qconfig("x86")
    first, second = tq.prepare_qat(net), tq.prepare_qat(net)
    first(batch[0] * 3)
    second(batch[0])
    found = tq.get_observer_state_dict(first)
    assert found
    assert all("scale" in k or "zero" in k or k.endswith((".lo", ".hi")) for k in found)
    tq.load_observer_state_dict(second, found)
    assert all(torch.equal(v, tq.get_observer_state_dict(second)[k]) for k, v in found.items())


@pytest.mark.parametrize(
    "make",
    [tq.MinMaxObserver, tq.MovingAverageMinMaxObserver, tq.HistogramObserver,
     tq.MinMaxObserver.with_args(dtype=torch.qint8, qscheme=torch.per_tensor_symmetric),
     tq.default_per_channel_weight_observer, tq.default_weight_observer],
)  # fmt: skip
def test_observers_called_directly(make):
    torch.manual_seed(0)
    observer, x = make(), torch.randn(4, 64)
    observer(x)
    scale, zero = observer.calculate_qparams()
    assert scale.shape == zero.shape
    assert zero.dtype == torch.int64
    rows = observer.ch_axis is not None
    low = -128 if observer.dtype == torch.qint8 else 0
    q = torch.clamp(
        torch.round(x / (scale[:, None] if rows else scale)) + (zero[:, None] if rows else zero),
        low,
        low + 255,
    )
    back = (q - (zero[:, None] if rows else zero)) * (scale[:, None] if rows else scale)
    assert float((back - x).abs().mean()) < 0.05


def test_fake_quantize_called_directly():
    make = tq.get_default_qat_qconfig("x86").weight
    fake, w = make(), torch.randn(6, 10, requires_grad=True)
    y = fake(w)
    y.sum().backward()
    assert torch.equal(w.grad, torch.ones_like(w))
    scale, _ = fake.calculate_qparams()
    assert scale.shape == (6,)
    assert torch.allclose(y / scale[:, None], torch.round(y / scale[:, None]), atol=1e-4)
    fake.disable_fake_quant()
    assert fake(w) is w


def test_clear_errors(net, batch):
    with pytest.raises(InputError, match="no module has a qconfig"):
        tq.prepare_qat(net)
    net.qconfig = tq.get_default_qat_qconfig("x86")
    with pytest.raises(EmptyCalibration, match="seen an input"):
        tq.convert(tq.prepare_qat(net))(batch[0])
    with pytest.raises(InputError, match="convl"):
        tq.fuse_modules(net.eval(), [["convl", "bn1"]])
    with pytest.raises(InputError, match="cannot fuse"):
        tq.fuse_modules(net, [["bn1", "conv1"]])
    with pytest.raises(InputError, match="train mode"):
        tq.prepare_qat(net)
    with pytest.raises(InputError, match="fbgem"):
        tq.get_default_qconfig("fbgem")
    with pytest.raises(InputError, match="not instances"):
        tq.QConfig(tq.MinMaxObserver(), tq.MinMaxObserver)
    with pytest.raises(AttributeError, match="prepare_qat"):
        tq.prepare_qta  # noqa: B018
    with pytest.raises(PennyweightError, match="prepared"):
        tq.convert(nn.Linear(2, 2))

"""The FX face: mappings, dictionaries, old calls without example inputs."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pennyweight.compat.quantization import (
    FakeQuantize,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    QConfig,
    QConfigMapping,
    default_affine_fixed_qparams_observer,
    default_dynamic_qconfig,
    default_weight_fake_quant,
    float_qparams_weight_only_qconfig,
    get_default_qat_qconfig,
    get_default_qat_qconfig_mapping,
    get_default_qconfig,
    get_default_qconfig_mapping,
)
from pennyweight.compat.quantization.backend_config import BackendConfig, BackendPatternConfig
from pennyweight.compat.quantization.fx.custom_config import PrepareCustomConfig
from pennyweight.compat.quantization.quantize_fx import convert_fx, fuse_fx, prepare_fx, prepare_qat_fx
from pennyweight.errors import EmptyCalibration, InputError, PennyweightError, UnrealisableSite
from pennyweight.nn.fake import ActivationQuantizer


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)

    def forward(self, x):
        return F.relu(x + self.bn(self.conv(x)))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.first, self.second = nn.Conv2d(1, 4, 3), Block(), Block()
        self.fc1, self.fc2 = nn.Linear(4, 8), nn.Linear(8, 3)
        self.kept = "an attribute of the user's"

    def forward(self, x):
        x = self.second(self.first(F.relu(self.stem(x)))).mean((2, 3))
        return self.fc2(F.relu(self.fc1(x)))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def x():
    torch.manual_seed(1)
    return torch.randn(16, 1, 8, 8)


def integer_layers(model):
    return sorted(n for n, m in model.named_modules() if type(m).__name__ in ("IntegerConv", "IntegerLinear"))


def ptq(net, mapping, x, **options):
    prepared = prepare_fx(net.eval(), mapping, (x,), **options)
    with torch.no_grad():
        prepared(x)
        return convert_fx(prepared)


ALL = ["fc1", "fc2", "first.conv", "second.conv", "stem"]


def test_calibration(net, x):
    done = ptq(net, get_default_qconfig_mapping("x86"), x)
    assert integer_layers(done) == ALL
    assert done.kept == net.kept
    assert isinstance(done, Net)
    with torch.no_grad():
        assert (done(x) - net(x)).abs().max() < 0.05


@pytest.mark.parametrize("given", [True, False])
def test_training_with_and_without_example_inputs(net, x, given):
    old = net.train()
    prepared = prepare_qat_fx(old, {"": get_default_qat_qconfig("fbgemm")}, *([(x,)] if given else []))
    optimizer = torch.optim.SGD(prepared.parameters(), 0.05)
    assert prepared.stem.weight is net.stem.weight
    losses = []
    for _ in range(8):
        loss = F.cross_entropy(prepared(x), torch.arange(16) % 3)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    prepared.eval()
    with torch.no_grad():
        assert torch.allclose(convert_fx(prepared)(x), prepared(x), atol=0.05)


def test_precedence(net, x):
    eight = get_default_qconfig("x86")
    m = QConfigMapping().set_global(eight)
    assert integer_layers(ptq(net, m.set_object_type(nn.Linear, None), x)) == [
        "first.conv",
        "second.conv",
        "stem",
    ]
    m.set_module_name("fc2", eight)
    assert integer_layers(ptq(net, m, x)) == ["fc2", "first.conv", "second.conv", "stem"]
    m.set_module_name_regex("f.*", None)
    assert integer_layers(ptq(net, m, x)) == ["fc2", "second.conv", "stem"]
    m.set_module_name("second", None)
    assert integer_layers(ptq(net, m, x)) == ["fc2", "stem"]
    back = QConfigMapping.from_dict(m.to_dict())
    assert back.to_dict() == m.to_dict()
    assert integer_layers(ptq(net, back, x)) == ["fc2", "stem"]


def test_functions_are_named_by_type_and_order(net, x):
    eight = get_default_qconfig("x86")
    m = QConfigMapping().set_global(eight).set_module_name_object_type_order("first", torch.add, 0, None)
    done = ptq(net, m, x)
    assert "_pw_calls" not in done.first._modules
    assert "add/0" in done.second._modules["_pw_calls"]._modules


def test_what_is_nearest_decides(net, x):
    eight = get_default_qconfig("x86")
    m = QConfigMapping().set_global(eight).set_module_name("first", eight).set_module_name("first.conv", None)
    assert integer_layers(ptq(net, m, x)) == ["fc1", "fc2", "second.conv", "stem"]
    m = QConfigMapping().set_global(eight).set_module_name_regex("first", None)
    done = ptq(net, m, x)
    assert integer_layers(done) == ["fc1", "fc2", "second.conv", "stem"]
    assert "_pw_calls" not in done.first._modules
    m = QConfigMapping().set_global(eight).set_object_type(Block, None)
    done = ptq(net, m, x)
    assert integer_layers(done) == ["fc1", "fc2", "stem"]
    assert "_pw_calls" not in done.second._modules


@pytest.mark.parametrize(
    ("scope", "kind", "index", "left"), [("", nn.Linear, 1, "fc2"), ("first", nn.Conv2d, 0, "first.conv")]
)
def test_modules_are_named_by_type_and_order(net, x, scope, kind, index, left):
    m = get_default_qconfig_mapping("x86").set_module_name_object_type_order(scope, kind, index, None)
    assert integer_layers(ptq(net, m, x)) == [n for n in ALL if n != left]


def test_the_rate_of_moving_averages_is_read(net, x):
    slow = FakeQuantize.with_args(
        observer=MovingAverageMinMaxObserver, averaging_constant=0.25, quant_min=0, quant_max=255
    )
    m = QConfigMapping().set_global(QConfig(slow, default_weight_fake_quant))
    prepared = prepare_qat_fx(net.train(), m, x)
    prepared(x)
    prepared(3 * x)
    assert torch.isclose(prepared.stem.input.hi, 1.5 * x.max())  # m + (3 m - m) / 4
    assert {q.rate for q in prepared.modules() if isinstance(q, ActivationQuantizer)} == {0.25}


def test_observers_of_ones_own_that_would_not_be_called_are_refused(net, x):
    class Mine(MinMaxObserver):
        def calculate_qparams(self):
            return torch.tensor([7.0]), torch.tensor([3])

    for activation in (Mine, FakeQuantize.with_args(observer=Mine)):
        m = QConfigMapping().set_global(QConfig(activation, default_weight_fake_quant))
        with pytest.raises(UnrealisableSite, match=r"Mine\.calculate_qparams"):
            prepare_fx(net, m, x)
    m = QConfigMapping().set_global(QConfig(default_affine_fixed_qparams_observer, default_weight_fake_quant))
    with pytest.raises(UnrealisableSite, match="known scale"):
        prepare_fx(net, m, x)


def test_dynamic_and_tables():
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.fc = nn.Embedding(30, 8), nn.Linear(8, 4)

        def forward(self, ids):
            return self.fc(self.table(ids))

    torch.manual_seed(0)
    words, ids = Words().eval(), torch.randint(0, 30, (5,))
    m = QConfigMapping().set_global(default_dynamic_qconfig)
    done = convert_fx(prepare_fx(words, m, (ids,)))
    assert (type(done.table).__name__, type(done.fc).__name__) == ("Embedding", "IntegerLinear")
    m.set_object_type(nn.Embedding, float_qparams_weight_only_qconfig)
    done = convert_fx(prepare_fx(words, m, (ids,)))
    assert type(done.table).__name__ == "IntegerEmbedding"
    assert torch.allclose(done(ids), words(ids), atol=0.05)


def test_custom_and_backend_configs_are_read(net, x):
    m = get_default_qconfig_mapping("x86")
    custom = PrepareCustomConfig().set_non_traceable_module_classes([Block])
    assert integer_layers(ptq(net, m, x, prepare_custom_config=custom)) == ["fc1", "fc2", "stem"]
    custom = {"non_traceable_module_name": ["fc1"], "preserved_attributes": ["kept"]}
    assert integer_layers(ptq(net, m, x, prepare_custom_config=custom)) == [
        "fc2",
        "first.conv",
        "second.conv",
        "stem",
    ]
    backend = BackendConfig("mine").set_backend_pattern_config(BackendPatternConfig(nn.Linear))
    assert integer_layers(ptq(net, m, x, backend_config=backend)) == ["fc1", "fc2"]


def test_fuse_fx_folds(net, x):
    with torch.no_grad():
        net.first.bn.running_mean.normal_()
    fused = fuse_fx(net.eval())
    assert isinstance(fused.first.bn, nn.Identity)
    assert torch.allclose(fused(x), net(x), atol=1e-5)
    assert isinstance(net.first.bn, nn.BatchNorm2d)


def test_state_dicts_are_plain_and_load(net, x):
    prepared = prepare_qat_fx(net.train(), get_default_qat_qconfig_mapping(), x)
    prepared(x)
    done = convert_fx(prepared.eval())
    assert {type(v) for v in done.state_dict().values()} == {torch.Tensor}
    other = prepare_qat_fx(Net().train(), get_default_qat_qconfig_mapping(), x)
    other(x)
    other = convert_fx(other.eval())
    other.load_state_dict(copy.deepcopy(done.state_dict()))
    assert torch.equal(other(x), done(x))


def test_clear_errors(net, x):
    with pytest.raises(InputError, match="no QConfigMapping"):
        prepare_fx(net, "x86", (x,))
    with pytest.raises(InputError, match="modul_name"):
        prepare_fx(net, {"modul_name": []}, (x,))
    unseen = convert_fx(prepare_qat_fx(net, get_default_qat_qconfig_mapping()))
    for use in (lambda: unseen(x), unseen.state_dict):
        with pytest.raises(EmptyCalibration, match="converted"):
            use()
    with pytest.raises(PennyweightError, match="equalization"):
        prepare_fx(net, get_default_qconfig_mapping(), (x,), _equalization_config={"": 1})
    with pytest.raises(PennyweightError, match="standalone"):
        PrepareCustomConfig().set_standalone_module_name("fc1")
    with pytest.raises(PennyweightError, match="float weights"):
        convert_fx(prepare_fx(net, get_default_qconfig_mapping(), (x,)), keep_original_weights=True)

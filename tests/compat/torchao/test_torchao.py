"""The names of torchao: configurations, in place, and training in two steps."""

import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pennyweight as pw
from pennyweight.compat.torchao import quantization as ao
from pennyweight.compat.torchao.quantization import qat
from pennyweight.errors import InputError, NothingQuantized, PennyweightError


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(40, 64)
        self.up, self.down, self.head = nn.Linear(64, 96), nn.Linear(96, 64), nn.Linear(64, 40, bias=False)

    def forward(self, ids):
        x = self.table(ids)
        return self.head(x + self.down(F.gelu(self.up(x))))


@pytest.fixture
def words():
    torch.manual_seed(0)
    return Words()


@pytest.fixture
def ids():
    return torch.randint(0, 40, (4, 16), generator=torch.Generator().manual_seed(1))


CONFIGS = [
    (ao.Int8WeightOnlyConfig(), 40), (ao.Int8WeightOnlyConfig(group_size=32), 40), (ao.int8_weight_only(), 40),
    (ao.Int4WeightOnlyConfig(group_size=32), 17), (ao.int4_weight_only(group_size=64), 15),
    (ao.Int8DynamicActivationInt8WeightConfig(), 35), (ao.int8_dynamic_activation_int8_weight(), 35),
    (ao.Int8DynamicActivationInt4WeightConfig(group_size=32), 17), (ao.int8_dynamic_activation_int4_weight(32), 17),
    (ao.IntxWeightOnlyConfig(torch.int4, ao.PerGroup(32)), 17), (ao.IntxWeightOnlyConfig(torch.int8, ao.PerAxis(0)), 40),
    (ao.Int8DynamicActivationIntxWeightConfig(torch.int4, weight_granularity=ao.PerGroup(32)), 17),
]  # fmt: skip


@pytest.mark.parametrize(("config", "decibels"), CONFIGS, ids=lambda c: type(c).__name__)
def test_configurations(words, ids, config, decibels):
    with torch.no_grad():
        before = words(ids)
        assert ao.quantize_(words, config) is None
        after = words(ids)
    assert {type(m).__name__ for m in words.children()} == {"Embedding", "IntegerLinear"}
    assert float(10 * torch.log10((before**2).sum() / ((before - after) ** 2).sum())) > decibels
    assert {type(v) for v in words.state_dict().values()} == {torch.Tensor}
    saved = io.BytesIO()
    torch.save(words.state_dict(), saved)
    saved.seek(0)
    other = Words()
    ao.quantize_(other, config)
    other.load_state_dict(torch.load(saved, weights_only=True))
    assert torch.equal(other(ids), after)


def test_a_filter_chooses_and_a_second_call_adds(words, ids):
    ao.quantize_(words, ao.Int8WeightOnlyConfig(), lambda m, name: name == "head")
    assert [type(m).__name__ for m in words.children()] == ["Embedding", "Linear", "Linear", "IntegerLinear"]
    ao.quantize_(words, ao.Int8DynamicActivationInt8WeightConfig(), lambda m, name: name == "up")
    assert [type(m).__name__ for m in words.children()] == [
        "Embedding",
        "IntegerLinear",
        "Linear",
        "IntegerLinear",
    ]
    assert words(ids).shape == (4, 16, 40)
    with pytest.raises(NothingQuantized, match="down"):
        ao.quantize_(words, ao.Int8WeightOnlyConfig(), lambda m, name: "attention" in name)


def learn(model, ids, steps=6):
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    model.train()
    losses = []
    for _ in range(steps):
        loss = F.cross_entropy(model(ids).flatten(0, 1), ids.roll(1, 1).flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    model.eval()
    return losses


QUANTIZERS = {
    "8da4w": lambda: qat.Int8DynActInt4WeightQATQuantizer(groupsize=32),
    "8da4w-rows": lambda: qat.Int8DynActInt4WeightQATQuantizer(),  # groups of 256 divide nothing here
    "4w": lambda: qat.Int4WeightOnlyQATQuantizer(groupsize=32),
    "both": lambda: qat.ComposableQATQuantizer(
        [
            qat.Int8DynActInt4WeightQATQuantizer(groupsize=32),
            qat.Int4WeightOnlyEmbeddingQATQuantizer(group_size=32),
        ]
    ),
}


@pytest.mark.parametrize("name", QUANTIZERS)
def test_training_in_two_steps(words, ids, name, tmp_path):
    quantizer, weight = QUANTIZERS[name](), words.up.weight
    model = quantizer.prepare(words)
    assert model is words
    assert model.up.weight is weight
    losses = learn(model, ids)
    assert losses[-1] < losses[0]
    with torch.no_grad():
        trained = model(ids)
        assert quantizer.convert(model) is words
        assert torch.allclose(model(ids), trained, atol=1e-4)
    assert type(model.up).__name__ == "IntegerLinear"
    assert type(model.table).__name__ == ("IntegerEmbedding" if name == "both" else "Embedding")
    pw.save(model, tmp_path / "a.dwt", example=ids)
    assert torch.allclose(torch.from_numpy(pw.load(tmp_path / "a.dwt")(ids.numpy())), trained, atol=1e-3)


@pytest.mark.parametrize("learned", [False, True])
def test_configurations_of_training(words, ids, learned):
    if learned:
        weight = qat.IntxFakeQuantizeConfig(torch.int4, group_size=32, range_learning=True)
        act = qat.FakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False)
        ao.quantize_(words, qat.IntXQuantizationAwareTrainingConfig(act, weight))
    else:
        base = ao.Int8DynamicActivationInt4WeightConfig(group_size=32)
        ao.quantize_(words, qat.QATConfig(base, step="prepare"))
    learn(words, ids)
    with torch.no_grad():
        trained = words(ids)
        done = (
            qat.FromIntXQuantizationAwareTrainingConfig() if learned else qat.QATConfig(base, step="convert")
        )
        ao.quantize_(words, done)
        assert torch.allclose(words(ids), trained, atol=1e-4)


def test_rounding_can_be_switched(words, ids):
    with torch.no_grad():
        before = words(ids)
        model = qat.Int8DynActInt4WeightQATQuantizer(groupsize=32).prepare(words)
        model.apply(qat.disable_8da4w_fake_quant)
        assert torch.allclose(model(ids), before, atol=1e-6)
        model.apply(qat.enable_8da4w_fake_quant)
        assert not torch.allclose(model(ids), before, atol=1e-3)


def test_clear_errors(words):
    with pytest.raises(PennyweightError, match="fp8"):
        ao.Float8WeightOnlyConfig  # noqa: B018
    with pytest.raises(PennyweightError, match="no configuration"):
        ao.quantize_(words, object())
    with pytest.raises(InputError, match="int2"):
        ao.IntxWeightOnlyConfig(torch.float16).weight()
    with pytest.raises(ValueError, match="train"):
        qat.QATConfig(ao.Int8WeightOnlyConfig(), step="train")
    with pytest.raises(PennyweightError, match="prepared"):
        qat.Int8DynActInt4WeightQATQuantizer().convert(words)

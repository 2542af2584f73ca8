"""Layers that change their format without being calibrated again."""

import pytest
import torch

import pennyweight as pw
from pennyweight.errors import EmptyCalibration
from pennyweight.pipeline import calibrate, prepare
from pennyweight.recipe import Recipe
from pennyweight.tune.probe import Probe, compared, first_samples

FORMATS = ("float32", "bf16", "int8", "int4", "w4a4")


@pytest.fixture
def probe(quarters):
    model, x, _ = quarters
    return Probe(model, list(x[:128].split(32)), FORMATS, Recipe.preset("int8"), samples=64)


def test_float_is_float_and_comes_back(probe, quarters):
    model, x, _ = quarters
    with torch.no_grad():
        wanted = model(x[:64])
    torch.testing.assert_close(torch.cat(probe.reference), wanted, rtol=1e-4, atol=1e-4)
    assert probe.damage().noise == 0
    probe.assign(dict.fromkeys(probe.layers, "w4a4"))
    assert probe.damage().noise > 0
    probe.assign({})
    assert probe.damage().noise == 0


def test_fewer_bits_do_more_damage(probe):
    for layer in probe.layers:
        noise = []
        for form in ("bf16", "int8", "int4", "w4a4"):
            assert form in probe.choices(layer)
            probe.set(layer, form)
            noise.append(probe.damage().noise)
            probe.set(layer, None)
        assert noise[0] < noise[2] < noise[3]
        assert noise[1] < noise[2]


def test_int8_throughout_is_what_the_recipe_makes(probe, quarters):
    model, x, _ = quarters
    batches = list(x[:128].split(32))
    simulated = calibrate(prepare(model, batches[0], "int8"), batches, progress=False)
    probe.assign(dict.fromkeys(probe.layers, "int8"))
    with torch.no_grad():
        wanted = simulated(x[:64])
    torch.testing.assert_close(torch.cat(probe.outputs()), wanted, rtol=0, atol=0)


def test_parts_are_less_than_the_whole(probe):
    probe.set("second", "w4a4", activations=False)
    weights = probe.damage().noise
    probe.set("second", "w4a4", weight=False)
    inputs = probe.damage().noise
    probe.set("second", "w4a4")
    both = probe.damage().noise
    assert 0 < max(weights, inputs) < both < 3 * (weights + inputs)


def test_the_model_stays_as_it_was(quarters):
    model, x, _ = quarters
    before = {n: p.clone() for n, p in model.state_dict().items()}
    Probe(model, [x[:16]], FORMATS, Recipe.preset("int8")).assign({"first": "int4"})
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert type(model.first) is torch.nn.Conv2d


def test_no_batch_is_refused(quarters):
    with pytest.raises(EmptyCalibration):
        Probe(quarters[0], [], FORMATS, Recipe.preset("int8"))


def test_samples_are_cut_to_number():
    batches = [(torch.ones(10, 2), torch.ones(10)), (torch.ones(10, 2), torch.ones(10))]
    assert [len(b[0]) for b in first_samples(batches, 13)] == [10, 3]
    assert len(first_samples([{"a": torch.ones(4, 1)}], 64)) == 1


def test_embeddings_and_products_take_what_they_can():
    torch.manual_seed(0)

    class Words(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.out = torch.nn.Embedding(16, 8), torch.nn.Linear(8, 4)

        def forward(self, ids):
            x = self.words(ids)
            return self.out(torch.nn.functional.scaled_dot_product_attention(x, x, x).mean(1))

    model, ids = Words().eval(), torch.randint(0, 16, (12, 6))
    probe = Probe(model, [ids], FORMATS, Recipe.preset("int8"))
    assert probe.choices("words") == ["float32", "int8"]
    (product,) = [n for n in probe.layers if "attention" in n]
    assert probe.choices(product) == ["float32", "bf16", "int8"]
    probe.set(product, "int8")
    assert probe.damage().noise > 0
    assert isinstance(pw.quantize(model, [ids], progress=False), Words)


def test_damage_is_what_it_says():
    y = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    same = compared([y], [y])
    assert (same.noise, same.kl, same.agree, same.sqnr_db) == (0, 0, 1, 200)
    other = compared([y], [y.flip(1)])
    assert other.agree == 0
    assert other.noise == pytest.approx(2.0)
    assert other.kl > 0

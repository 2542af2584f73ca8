"""Scales chosen together: the loss falls below that of any p-norm, and Powell's method finds minima."""

import pytest
import torch
from torch import nn

import pennyweight as pw
from pennyweight.passes.lapq import powell
from pennyweight.recipe import Recipe
from pennyweight.reconstruction.results import divergence

RULES = """
[[rules]]
weight = "int3n[1,*]"
input = "uint3[*]+z"

[[passes]]
pass = "calibrate"
range = "mse"
"""
NEAREST = RULES + '\n[[passes]]\npass = "solve"\nrange = "mse"\n'
JOINT = RULES + '\n[[passes]]\npass = "lapq"\nevaluations = 150\nsamples = 256\n'


def network():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 5)
    )
    with torch.no_grad():
        model[5].weight *= 10  # logits of some size
    return model.eval(), torch.randn(384, 3, 8, 8)


def test_the_loss_falls():
    model, x = network()
    losses = {}
    for recipe in (NEAREST, JOINT):
        result = pw.quantize(model, [x[:128], x[128:256]], Recipe.parse(recipe), progress=False)
        with torch.no_grad():
            losses[recipe] = [float(divergence(model(part), result(part))) for part in (x[:256], x[256:])]
    assert losses[JOINT][0] < losses[NEAREST][0]
    assert losses[JOINT][1] < 1.02 * losses[NEAREST][1]  # inputs it was not tuned on
    (event,) = pw.journal(result).of("lapq")
    assert event.data["joint"] < event.data["layerwise"]
    assert event.data["scales"] == 6
    assert 2 <= event.data["power"] <= 4


def test_it_is_deterministic():
    model, x = network()
    recipe = Recipe.parse(JOINT.replace("150", "20"))
    first, again = (pw.quantize(model, [x[:64]], recipe, progress=False) for _ in range(2))
    assert torch.equal(first(x), again(x))


def test_powell():
    """A narrow valley across the axes."""
    a = torch.tensor([[2.0, 1.8, 0.0], [1.8, 2.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    goal = torch.tensor([0.3, -0.4, 0.7], dtype=torch.float64)
    calls = []

    def f(x):
        calls.append(x)
        return float((x - goal) @ a @ (x - goal))

    start = torch.zeros(3, dtype=torch.float64)
    found, value = powell(f, start, f(start), 0.1, 200, lambda: None)
    assert value < 1e-3 * f(start)
    assert len(calls) <= 202
    torch.testing.assert_close(found, goal, rtol=0, atol=0.05)
    assert powell(f, start, -1.0, 0.1, 50, lambda: None)[1] == -1.0  # nothing is worse than the start


def test_no_batch():
    with pytest.raises(pw.errors.EmptyCalibration):
        pw.quantize(network()[0], None, Recipe.parse(JOINT), example=torch.randn(2, 3, 8, 8), progress=False)

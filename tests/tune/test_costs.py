"""Costs of layers: times that are sure, bytes and bit operations that can be counted."""

import numpy as np
import pytest
import torch

from pennyweight.recipe import Recipe
from pennyweight.tune.costs import by_layer, measured_costs, mixed, settled, single
from pennyweight.tune.probe import Probe


def test_luck_is_not_speed():
    base = np.array([10.0, 11, 9, 10, 12, 8, 10, 11])
    luck = base[::-1] - np.array([1.5, -1, 1, -1, 1, -1, 1.5, -1])  # faster in half of the runs
    found = settled(
        {"int8": {"a": base, "b": base}, "bf16": {"a": luck, "b": base - 3}, "int4": {"a": base + 5}}
    )
    assert found["a|bf16"] >= np.median(base) or np.median(luck) >= np.median(base)
    assert found["b|bf16"] == pytest.approx(np.median(base) - 3)
    assert found["a|int4"] == pytest.approx(np.median(base) + 5)


def test_steps_are_summed_by_layer():
    sites = {"a": np.array([1.0, 2]), "a:relu/0": np.array([1.0, 1]), "other": np.array([9.0, 9])}
    found = by_layer(sites, lambda s: s.partition(":")[0] if s.startswith("a") else "")
    assert found["a"].tolist() == [2.0, 3.0]
    assert list(found) == ["a"]


def test_bytes_products_and_times(quarters):
    model, x, _ = quarters
    batches = list(x[:64].split(32))
    formats = ("float32", "bf16", "int8", "int4")
    base = Recipe.preset("int8")
    probe = Probe(model, batches, formats, base)
    costs = measured_costs(model, probe, batches, base, threads=1, seconds=0.05)
    weights = 8 * 8 * 9
    assert costs.of("second", "float32")["bytes"] == 4 * weights
    assert costs.of("second", "bf16")["bytes"] == 2 * weights
    assert costs.of("second", "int8")["bytes"] == weights + 4 * 8
    assert costs.of("second", "int4")["bytes"] == weights / 2 + 4 * 8
    assert costs.macs["second"] == 8 * 8 * 8 * 8 * 9  # places, channels out, terms
    assert costs.of("second", "int4")["bops"] == costs.macs["second"] * 4 * 8
    assert all(costs.of(layer, f)["ns"] > 0 for layer in probe.layers for f in formats)
    recipe = mixed(base, probe, {"first": "float32", "second": "int4", "last": "int8"})
    assert len(recipe.rules) == len(base.rules) + 2
    assert all(r.optional for r in recipe.rules)


def test_an_example_is_cut_to_its_batch():
    assert len(single((torch.ones(5, 2), torch.ones(5)), 1)[0]) == 1
    assert len(single({"x": torch.ones(2, 3)}, 5)["x"]) == 5
    other = (torch.ones(2, 3), torch.ones(4))
    assert single(other, 1) is other

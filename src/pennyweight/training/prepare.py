"""A trainable model from a float one, in one call."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

from pennyweight import pipeline
from pennyweight.journal import Journal
from pennyweight.passes.train import Train
from pennyweight.recipe import Recipe


def prepare(
    model: nn.Module,
    example: Any,
    recipe: str | Recipe = "int8-qat",
    *,
    weight: str | None = None,
    input: str | None = None,  # noqa: A002 (the site's name)
    journal: Journal | None = None,
) -> nn.Module:
    """As `pennyweight.prepare`; a recipe that does not train gets a `Train` pass.

    The result shares the parameters of `model`, keeps its class, its train or eval mode and its state-dict keys, and
    trains in any loop; `pennyweight.calibrate` may set its ranges first, `pennyweight.convert` ends it.

    Args:
        model: a float model.
        example: one batch.
        recipe: name of a preset, or a `Recipe`.
        weight: estimator of the weights, in place of the recipe's ("lsq" where it does not train).
        input: likewise, of the activations.
        journal: filled if given.

    Raises:
        RecipeError, PlanError, GraphError: see there.
    """
    chosen = Recipe.preset(recipe) if isinstance(recipe, str) else recipe
    named: dict[str, Any] = {
        key: value for key, value in (("weight", weight), ("input", input)) if value is not None
    }
    steps = chosen.passes if chosen.trains else (*chosen.passes, Train())
    steps = tuple(dataclasses.replace(s, **named) if isinstance(s, Train) else s for s in steps)
    chosen = dataclasses.replace(chosen, passes=steps)
    chosen.needs()
    return pipeline.prepare(model, example, chosen, journal=journal)

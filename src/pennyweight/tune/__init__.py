"""Searches for the cheapest formats that keep a model's accuracy, and what they rest on."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, overload

import torch.nn.functional as F
from torch import nn

from pennyweight.errors import InputError, RecipeError, nearest
from pennyweight.journal import Journal
from pennyweight.recipe import Recipe
from pennyweight.tune.fixed_point import PARAMETERS
from pennyweight.tune.goal import Goal, Trial, Tuning
from pennyweight.tune.ladder import FORMATS as LAYER_FORMATS
from pennyweight.tune.ladder import TARGETS, Climb
from pennyweight.tune.ristretto import Tuned, search
from pennyweight.tune.sensitivities import Sensitivity, sensitivity

FORMATS = {
    "ristretto": "fixed_point",
    "ristretto-pow2": "power_of_two",
    "ristretto-minifloat": "minifloat",
}


@overload
def tune(
    model: nn.Module, data: Iterable[Any], *, evaluate: Callable[[nn.Module], float], goal: float = 0.01,
    formats: str = "ristretto", train: Callable[[], Iterable[tuple[Any, Any]]] | None = None,
    loss: Callable[[Any, Any], Any] = F.cross_entropy, train_steps: int = 0, seed: int = 0,
    progress: bool = True, journal: Journal | None = None,
) -> Tuned: ...  # fmt: skip


@overload
def tune(
    model: nn.Module, data: Iterable[Any], *, evaluate: Callable[[nn.Module], float], goal: Goal,
    formats: Sequence[str] = LAYER_FORMATS, target: str = "native", budget: str | float | None = "10 min",
    recipe: str | Recipe = "int8", train: Callable[[], Iterable[tuple[Any, Any]]] | None = None,
    loss: Callable[[Any, Any], Any] = F.cross_entropy, train_steps: int = 0,
    cache: str | os.PathLike[str] | None = None,
    samples: int = 64, threads: int = 0, seed: int = 0, progress: bool = True, journal: Journal | None = None,
) -> Tuning: ...  # fmt: skip


def tune(
    model: nn.Module,
    data: Iterable[Any],
    *,
    evaluate: Callable[[nn.Module], float],
    goal: float | Goal = 0.01,
    formats: str | Sequence[str] | None = None,
    target: str = "native",
    budget: str | float | None = "10 min",
    recipe: str | Recipe = "int8",
    train: Callable[[], Iterable[tuple[Any, Any]]] | None = None,
    loss: Callable[[Any, Any], Any] = F.cross_entropy,
    train_steps: int = 0,
    cache: str | os.PathLike[str] | None = None,
    samples: int = 64,
    threads: int = 0,
    seed: int = 0,
    progress: bool = True,
    journal: Journal | None = None,
) -> Tuned | Tuning:
    """Search for the cheapest model that reaches a goal.

    With a `Goal`, climbs a ladder as far as the goal needs: data-free, calibrated, biases corrected, roundings learned
    (AdaRound), ranges at run time, formats layer by layer, and training if there is a loader.
    Formats are chosen by an exact solver over damages at the output that were measured layer by layer, and over times
    of each layer in each format that were measured on this machine; layers that share a quantizer share a format.
    Mixed models are verified with `evaluate`, by bisection along the predicted front. Once the goal is reached, mixes
    are tried only where they promise to be cheaper. The search ends within the budget, with the best found.

    With a number, searches for the fewest bits of dynamic fixed point that lose no more than that, see
    `ristretto.search`; with `train`, fine-tunes what it finds, and narrows on.

    Args:
        model: in eval mode; is left untouched.
        data: calibration batches, some hundred inputs; tensors, tuples of positional arguments, dicts of keyword ones.
        evaluate: the quality of a model; called under `torch.no_grad` with the float model, and with compiled and
            converted ones, which take the same inputs.
        goal: what to reach, see `Goal`.
        formats: those that a layer may have, "float32", "bf16", "int8", "int4", ... of `tune.formats`; for fixed point
            "ristretto" (each group of tensors a width of its own), "ristretto-pow2" (weights are powers of two) or
            "ristretto-minifloat" (weights are small floats, activations stay floats).
        target: what will run it; "native" is the engine here.
        budget: "10 min", "90 s", or seconds; None is without end. A trial that has begun is finished.
        recipe: what "int8" means.
        train: makes an epoch's (input, target) pairs; without it nothing is trained.
        loss: of output and target, for training.
        train_steps: batches to train on at most; 0 for as many as the budget allows. Of fixed point: for each
            fine-tuning, 0 for an epoch.
        cache: a JSON file for sensitivities, reused between runs on the same model, data and recipe.
        samples: inputs on which sensitivities are measured.
        threads: of the engine; 0 for as many as torch uses now.
        seed: of everything random. Times are measured: where two choices are as fast as each other, runs may differ.
        progress: print each trial.
        journal: filled if given; a `trial` event for each model that was evaluated.

    Returns:
        A `Tuning` of a `Goal`, a `Tuned` of a number: the converted model, what it was chosen from, and why.

    Raises:
        InputError: on an unknown format or target.
        RecipeError: on an unknown search.
        EmptyCalibration: if there is no batch.
        SolverError: if scipy is missing; of fixed point, if no combination of at most 8 bits meets the goal, fine-tuned
            where there is a loader.

    >>> found = pw.tune(model, batches, evaluate=accuracy, goal=pw.Goal(max_drop=0.5))     # doctest: +SKIP
    >>> print(found.met, found.chosen.speedup)                                             # doctest: +SKIP
    """
    log = Journal() if journal is None else journal
    if isinstance(goal, Goal):
        if target not in TARGETS:
            raise InputError(f"there is no target {target!r}", hint=nearest(target, TARGETS, "targets"))
        chosen = (
            LAYER_FORMATS if formats is None else (formats,) if isinstance(formats, str) else tuple(formats)
        )
        climb = Climb(
            model, list(data), evaluate, goal, base=Recipe.preset(recipe) if isinstance(recipe, str) else recipe,
            formats=chosen, budget=budget, train=train, loss=loss, train_steps=train_steps,
            cache=None if cache is None else os.fspath(cache),
            samples=samples, threads=threads, seed=seed, progress=progress, journal=log,
        )  # fmt: skip
        return climb.run()
    name = "ristretto" if formats is None else str(formats)
    if name not in FORMATS:
        raise RecipeError(f"there is no search {name!r}", hint=nearest(name, FORMATS, "formats"))
    return search(
        model, list(data), evaluate, goal, parameters=FORMATS[name], train=train, loss=loss, train_steps=train_steps,
        seed=seed, progress=progress, journal=log,
    )  # fmt: skip


__all__ = [
    "FORMATS", "PARAMETERS", "Goal", "Sensitivity", "Trial", "Tuned", "Tuning", "search", "sensitivity", "tune",
]  # fmt: skip

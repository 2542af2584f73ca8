"""Searches for the cheapest formats that keep a model's accuracy."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from pennyweight.errors import RecipeError, nearest
from pennyweight.journal import Journal
from pennyweight.tune.ristretto import PARAMETERS, Tuned, search

FORMATS = {"ristretto": "fixed_point", "ristretto-pow2": "power_of_two"}


def tune(
    model: nn.Module,
    data: Iterable[Any],
    *,
    evaluate: Callable[[nn.Module], float],
    goal: float = 0.01,
    formats: str = "ristretto",
    progress: bool = True,
    journal: Journal | None = None,
) -> Tuned:
    """Search for the fewest bits whose accuracy stays within `goal` of the float model's.

    Args:
        model: in eval mode; is left untouched.
        data: some ten batches of training data; tensors, tuples of positional arguments or dicts of keyword ones.
        evaluate: the accuracy of a model, greater is better; called with simulated and with converted models.
        goal: the greatest accepted loss, in the units of `evaluate`.
        formats: "ristretto": dynamic fixed point, weights of convolutions, weights of other layers and activations
            each of a width of their own; "ristretto-pow2": the same with weights that are powers of two.
        progress: print each trial and the table of integer and fractional lengths.
        journal: filled if given; a `trial` event for each model that was evaluated.

    Returns:
        The converted model, its accuracy, and the table.

    Raises:
        RecipeError: on unknown formats.
        EmptyCalibration: if there is no batch.
        SolverError: if no combination of at most 8 bits meets the goal.
    """
    if formats not in FORMATS:
        raise RecipeError(f"there is no search {formats!r}", hint=nearest(formats, FORMATS, "formats"))
    return search(
        model,
        list(data),
        evaluate,
        goal,
        parameters=FORMATS[formats],
        progress=progress,
        journal=Journal() if journal is None else journal,
    )


__all__ = ["FORMATS", "PARAMETERS", "Tuned", "search", "tune"]

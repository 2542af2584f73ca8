"""Preparation at the first forward: the old interfaces prepare a model before they have seen an input.

What `prepare` returns shares its parameters with what it becomes, so an optimizer made in between stays valid.
"""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from pennyweight import pipeline
from pennyweight.compat.quantization import _observing
from pennyweight.errors import EmptyCalibration
from pennyweight.nn.fake import Quantizer
from pennyweight.recipe import Recipe
from pennyweight.training import freeze_batch_norm

KEY = "_pw_waiting"


@dataclass
class Waiting:
    """What a model is going to be, and the switches set meanwhile."""

    recipe: Recipe
    notes: list[tuple[str, str]] = field(default_factory=list)
    switches: dict[str, bool] = field(default_factory=dict)


def wait(model: nn.Module, recipe: Recipe, notes: list[tuple[str, str]]) -> nn.Module:
    """Prepare `model` at its first forward; returns it."""
    vars(model)[KEY] = Waiting(recipe, notes)
    vars(model)["forward"] = functools.partial(_first, model)
    return model


def _first(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    bound = inspect.signature(type(model).forward).bind(model, *args, **kwargs)
    names = dict(list(bound.arguments.items())[1:])
    prepare_now(model, names if kwargs else tuple(args))
    return model(*args, **kwargs)


def prepare_now(model: nn.Module, example: Any) -> nn.Module:
    """Prepare a waiting model in place, on this example."""
    waiting: Waiting = vars(model).pop(KEY)
    vars(model).pop("forward", None)
    prepared = pipeline.prepare(model, example, waiting.recipe)
    for site, text in waiting.notes:
        pipeline.journal(prepared).add("note", site, text=text)
    pipeline.graft(model, prepared)
    _observing.start(model)
    for name, on in waiting.switches.items():
        if name == "norms":
            freeze_batch_norm(model, on)
            continue
        for module in model.modules():
            if isinstance(module, Quantizer):
                setattr(module, "active" if name == "rounding" else "following", on)
    return model


def remember(module: nn.Module, name: str, on: bool) -> None:
    """Keep a switch for a model that is not prepared yet; other modules have none."""
    waiting = vars(module).get(KEY)
    if waiting is not None:
        waiting.switches[name] = on


def ready(model: nn.Module) -> nn.Module:
    """The model, if it was prepared by a forward.

    Raises:
        EmptyCalibration: if it has seen no input yet.
    """
    if KEY in vars(model):
        raise EmptyCalibration(
            "the model was prepared but has seen no input", site=type(model).__name__,
            hint="Train or calibrate it before it is converted.",
        )  # fmt: skip
    return model

"""Training a network under ranges that were found before: fine-tuning of fixed point."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from pennyweight.errors import InputError
from pennyweight.journal import Journal
from pennyweight.passes import Context, clone
from pennyweight.passes.fold_batch_norm import FoldBatchNorm
from pennyweight.passes.train import Train
from pennyweight.pipeline import calibrate, convert, record
from pennyweight.recipe import Recipe

Loader = Callable[[], Iterable[tuple[Any, Any]]]
RATE = 0.002  # greatest learning rate: of a network that is trained already


def limited(batches: Loader, steps: int) -> Loader:
    """As many batches, begun again where an epoch ends.

    Raises:
        InputError: when an epoch has none.
    """

    def again() -> Iterable[tuple[Any, Any]]:
        left = steps
        while left:
            before = left
            for batch in batches():
                yield batch
                left -= 1
                if not left:
                    return
            if left == before:
                raise InputError(
                    "there is no batch to train on", hint="`train` must make an epoch at every call."
                )

    return again


def fine_tuned(
    model: nn.Module,
    batches: list[Any],
    recipe: Recipe,
    train: Loader,
    loss: Callable[[Any, Any], Any],
    steps: int,
    seed: int = 0,
) -> nn.Module:
    """A copy of a float model, trained with rounded values forward and float updates, converted.

    Norms are folded first, so that scales stay the powers of two that they are; ranges are those of the recipe's rules
    on the float model, from the first step to the last. The model itself is left untouched; it is the teacher.

    Args:
        model: in eval mode.
        batches: to calibrate with.
        recipe: folds norms, calibrates and solves; does not train.
        train: makes an epoch's (input, target) pairs.
        loss: of output and target.
        steps: batches to train on.
        seed: of dropout and the like.

    Raises:
        InputError: if there is nothing to train on.
        NonFinite: if the loss is.
    Source: Gysel et al. 2018 (arXiv:1604.03168), section 5.2 (shadow weights).
    """
    from pennyweight.training import Schedule, fit
    from pennyweight.training.prepare import prepare

    root = clone(model).eval()
    FoldBatchNorm().run(Context(root, record(root, batches[0]), Journal()))
    root = copy.deepcopy(root)  # parameters of its own
    held = Train("clipped", "clipped", {"calibrated": True}, {"calibrated": True})
    training = dataclasses.replace(recipe, passes=(*recipe.passes, held))
    prepared = calibrate(prepare(root, batches[0], training), batches, progress=False)
    torch.manual_seed(seed)
    fit(
        prepared, limited(train, steps), epochs=1, steps_per_epoch=steps, lr=RATE, loss=loss, teacher=model,
        schedule=Schedule(freeze_ranges=0, freeze_batch_norm=0), reestimate=0, progress=False,
    )  # fmt: skip
    return convert(prepared)

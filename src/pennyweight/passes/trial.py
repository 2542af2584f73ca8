"""What a change of a planned model is worth, judged on inputs that it was not fitted to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from pennyweight.graph.record import call
from pennyweight.journal import Journal
from pennyweight.passes import Context, clone
from pennyweight.passes.calibrate import Calibrate, observe, quantizers
from pennyweight.passes.correct_bias import CorrectBias
from pennyweight.passes.solve import Solve
from pennyweight.reconstruction.samples import first_tensor

ROUGH = (Calibrate("mse"), Solve("rtn", "mse", {"steps": 16, "shrink": 0.85}), CorrectBias())


def halves(batches: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Every other batch, and the others.

    A single batch is cut in the middle if its tensors have a first axis in common, and stands on both sides if not.
    """
    if len(batches) > 1:
        return list(batches[::2]), list(batches[1::2])
    sizes = {len(x) if x.ndim else 0 for x in tree_leaves(batches) if isinstance(x, Tensor)}
    count = sizes.pop() if len(sizes) == 1 else 0
    if count < 2:
        return list(batches), list(batches)

    def cut(part: slice) -> list[Any]:
        found: list[Any] = tree_map(lambda x: x[part] if isinstance(x, Tensor) else x, list(batches))
        return found

    return cut(slice(count // 2)), cut(slice(count // 2, None))


def held_out(context: Context, change: Callable[[Context], None], batches: Sequence[Any]) -> float:
    """`sum |y - y'|^2 / sum |y|^2` of a model's results when it is changed and quantized on one half of the inputs and
    judged on the other, summed over both ways round.

    y are the results as the model stands in `context`, y' those of a copy after `change`, with weights rounded to
    nearest, ranges by squared error and biases corrected. The context is left as it is.

    Args:
        context: at stage "adapt".
        change: what to do to a context of a copy, whose batches are the half to be fitted.
        batches: inputs.
    """
    noise = signal = 0.0
    parts = halves(batches)
    for fit, judge in (parts, parts[::-1]):
        trial = Context(
            clone(context.model), context.graph, Journal(), context.plan, partial(list, fit), context.seed,
            outputs=dict(context.outputs),
        )  # fmt: skip
        change(trial)
        observe(trial.model, {name for step in ROUGH for name in step.needs()}, fit)
        for step in ROUGH:
            step.run(trial)
        for quantizer in quantizers(trial.model).values():
            quantizer.active = quantizer.calibrated
        for wanted, found in zip(_results(context, judge), _results(trial, judge), strict=True):
            noise += float((wanted - found).pow(2).sum())
            signal += float(wanted.pow(2).sum())
    return noise / max(signal, 1e-30)


def _results(context: Context, batches: Iterable[Any]) -> list[Tensor]:
    with torch.no_grad():
        return [first_tensor(call(context.model, batch)).double() for batch in batches]

"""What a change of a planned model is worth, judged on inputs that it was not fitted to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
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


def held_out(
    context: Context, changes: Iterable[Callable[[Context], None]], batches: Sequence[Any]
) -> list[float]:
    """`sum |y - y'|^2 / sum |y|^2` of a model's results when it is changed and quantized on one half of the inputs and
    judged on the other, summed over both ways round; for each of some changes.

    y are the results as the model stands in `context`, y' those of a copy after `change`, with weights rounded to
    nearest, ranges by squared error and biases corrected. The context is left as it is.

    Args:
        context: at stage "adapt".
        changes: what to do to a context of a copy, whose batches are the half to be fitted.
        batches: inputs.
    """
    one, other = halves(batches)
    sides = [(fit, judge, _results(context.model, judge)) for fit, judge in ((one, other), (other, one))]
    signal = sum(float(y.pow(2).sum()) for _, _, wanted in sides for y in wanted)
    errors = []
    for change in changes:
        noise = 0.0
        for fit, judge, wanted in sides:
            found = _results(_quantized(context, change, fit), judge)
            noise += sum(float((y - z).pow(2).sum()) for y, z in zip(wanted, found, strict=True))
        errors.append(noise / max(signal, 1e-30))
    return errors


def _quantized(context: Context, change: Callable[[Context], None], fit: list[Any]) -> nn.Module:
    """A copy of the model, changed and roughly quantized on some inputs."""
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
    return trial.model


def _results(model: nn.Module, batches: Iterable[Any]) -> list[Tensor]:
    with torch.no_grad():
        return [first_tensor(call(model, batch)).double() for batch in batches]

"""Incremental quantization: the largest weights are held at their levels, part by part, while the rest trains on."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from pennyweight.errors import InputError
from pennyweight.formats import grids
from pennyweight.nn.fake import WeightQuantizer
from pennyweight.ranges.power_of_two import PowerOfTwo
from pennyweight.stats.values import Values
from pennyweight.training.oscillation import hold, rounded_weights
from pennyweight.training.schedule import Schedule


@dataclass(frozen=True)
class INQSchedule(Schedule):
    """`Schedule` under which weights become levels in parts. Apply it at the start of every step.

        part k, from step s_k on:  the floor(p_k n) weights of a layer that are largest, those of the parts before among
        them, are held at their nearest levels; the others train in float, unrounded

    Ranges are set once, when the first part begins: on grids of powers of two `s = 2^floor(log2(4/3 max|w|))`, as the
    paper has it, on others the range that the quantizer has by then. What is held is part of the model's state dict,
    so training that resumes goes on as it was. Activations are scheduled as in `Schedule`. Transposed convolutions and
    other layers than linear ones and convolutions train as their estimators say.

    Args:
        steps: first step of each part, ascending.
        shares: p_k, cumulative, ascending; the last is 1, so that all weights are levels in the end.

    Raises:
        InputError: on steps and shares that do not fit each other, or negative steps.
    Source: Zhou et al. 2017, INQ (arXiv:1702.03044), section 2.2 and 3.1 (shares, pruning-inspired partition).
    """

    steps: tuple[int, ...] = field(kw_only=True)
    shares: tuple[float, ...] = (0.5, 0.75, 0.875, 1.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.steps) != len(self.shares):
            raise InputError(
                f"{len(self.steps)} steps for {len(self.shares)} shares {self.shares}",
                site="INQSchedule",
                hint="Give every share the step at which it begins.",
            )
        ascend = [*self.steps] == sorted({*self.steps}) and [*self.shares] == sorted({*self.shares})
        if not ascend or not self.steps or self.steps[0] < 0:
            raise InputError(f"steps {self.steps} and shares {self.shares} must ascend", site="INQSchedule")
        if self.shares[0] <= 0 or self.shares[-1] != 1:
            raise InputError(f"shares {self.shares} are not within 0 and 1, the end", site="INQSchedule")

    @torch.no_grad()
    def apply(self, model: nn.Module, step: int) -> None:
        """Set every quantizer and batch norm for this step, hold what is to be held.

        Args:
            model: from `prepare`, wrapped or not.
            step: number of the step, from 0.

        Raises:
            InputError: if the model has no weight that is rounded, or an estimator that bends weights before.
        """
        super().apply(model, step)
        found = list(rounded_weights(model))
        if not found:
            raise InputError(
                "no weight is rounded in training", site="INQSchedule", hint="Use training.prepare."
            )
        part = sum(begin <= step for begin in self.steps)
        for weight, quantizer in found:
            quantizer.active = part > 0
            if part:
                _pin(quantizer, weight, self.shares[part - 1])


def _pin(quantizer: WeightQuantizer, weight: Tensor, share: float) -> None:
    """Pin what is missing of a share, and write what is pinned into the weight: optimizers move it by momentum."""
    matrix = weight.detach().flatten(1)
    if quantizer.pinned is None:
        if not torch.equal(quantizer.estimator.latent(matrix), matrix):
            raise InputError(
                "weights are bent before they are rounded, so that none can be held at a level",
                site=quantizer.site,
                hint='Train them with the estimator "clipped".',
            )
        if _powers(quantizer):
            quantizer.set(PowerOfTwo("inq")(Values.of(matrix.float(), quantizer.spec), quantizer.spec))
        quantizer.pin(matrix, torch.zeros_like(matrix, dtype=torch.bool))
    assert quantizer.pinned is not None
    free = torch.isnan(quantizer.pinned)
    missing = int(share * matrix.numel()) - int((~free).sum())
    if missing > 0:
        sizes = torch.where(free, matrix.abs().float(), -1.0).flatten()
        largest = torch.zeros_like(sizes, dtype=torch.bool)
        largest[sizes.topk(missing).indices] = True
        quantizer.pin(matrix, largest.reshape(matrix.shape))
    hold(weight, ~torch.isnan(quantizer.pinned), quantizer.pinned)


def _powers(quantizer: WeightQuantizer) -> bool:
    """Whether the grid is one of powers of two, 1 the greatest."""
    levels = grids[quantizer.spec.grid].levels().abs()
    exponents = torch.log2(levels[levels > 0])
    return float(levels.max()) == 1 and bool((exponents == exponents.round()).all())

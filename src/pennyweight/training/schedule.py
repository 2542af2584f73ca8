"""When quantizers observe, round and freeze."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from pennyweight.errors import InputError
from pennyweight.nn.fake import Quantizer
from pennyweight.training.batch_norm import freeze_batch_norm


@dataclass(frozen=True)
class Schedule:
    """Observers on -> rounding on -> ranges frozen -> batch-norm statistics frozen, by step or by epoch.

    Apply it at the start of every step (or epoch): `schedule.apply(model, step)`. It has no memory: what it sets
    depends on the number given alone, so training that resumes from a checkpoint goes on as it was.

    Args:
        quantize: first step at which values are rounded; until then the model computes in float, ranges are observed.
        freeze_ranges: first step at which ranges that are not learned stay as they are; None: never.
        freeze_batch_norm: first step at which batch norms use their running statistics; None: never.

    Raises:
        InputError: on negative steps.
    Source: Jacob et al. 2018 (arXiv:1712.05877), section 3.1 (delayed rounding of activations); the order of freezing
    as in the recipes of torchvision.
    """

    quantize: int = 0
    freeze_ranges: int | None = None
    freeze_batch_norm: int | None = None

    def __post_init__(self) -> None:
        for name in ("quantize", "freeze_ranges", "freeze_batch_norm"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise InputError(f"{name} = {value} is negative", site="Schedule")

    def apply(self, model: nn.Module, step: int) -> None:
        """Set every quantizer and batch norm for this step; cheap where nothing changes.

        Args:
            model: from `prepare`, wrapped or not.
            step: number of the step or epoch, from 0.
        """
        rounding = step >= self.quantize
        following = self.freeze_ranges is None or step < self.freeze_ranges
        for module in model.modules():
            if isinstance(module, Quantizer):
                module.active, module.following = rounding, following
        freeze_batch_norm(model, self.freeze_batch_norm is not None and step >= self.freeze_batch_norm)

"""The schedule and what surrounds it, for trainers that own the loop."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from pennyweight.training.batch_norm import reestimate_batch_norm
from pennyweight.training.oscillation import OscillationFreezing
from pennyweight.training.schedule import Schedule


class _Steps:
    """What happens before every step and at the end, whoever calls."""

    def __init__(
        self, schedule: Schedule, freezing: float | None = None, reestimate: Iterable[Any] | None = None
    ) -> None:
        self.schedule, self.threshold, self.reestimate = schedule, freezing, reestimate
        self.freezer = None if freezing is None else OscillationFreezing()

    def before(self, model: nn.Module, step: int) -> None:
        self.schedule.apply(model, step)

    def after(self, model: nn.Module) -> None:
        if self.freezer is not None and self.threshold is not None:
            self.freezer.step(model, self.threshold)

    def end(self, model: nn.Module) -> None:
        if self.reestimate is not None:
            reestimate_batch_norm(model, self.reestimate)


def transformers_callback(
    schedule: Schedule, freezing: float | None = None, reestimate: Iterable[Any] | None = None
) -> Any:
    """A `TrainerCallback` for the Trainer of transformers, whose model comes from `training.prepare`.

    Args:
        schedule: applied at the start of every step, by `state.global_step`, so a resumed run goes on as it was.
        freezing: threshold of `OscillationFreezing`, if wanted.
        reestimate: batches for `reestimate_batch_norm` at the end, if wanted.

    Raises:
        ImportError: without transformers.
    """
    from transformers import TrainerCallback

    steps = _Steps(schedule, freezing, reestimate)

    class QuantizationCallback(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(
            self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
        ) -> None:
            steps.before(model, state.global_step)

        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            steps.after(model)

        def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            steps.end(model)

    return QuantizationCallback()


def lightning_callback(
    schedule: Schedule, freezing: float | None = None, reestimate: Iterable[Any] | None = None
) -> Any:
    """A `Callback` for Lightning; the LightningModule holds a model from `training.prepare`.

    Args:
        schedule: applied at the start of every batch, by `trainer.global_step`.
        freezing: threshold of `OscillationFreezing`, if wanted.
        reestimate: batches for `reestimate_batch_norm` at the end, if wanted.

    Raises:
        ImportError: without lightning or pytorch_lightning.
    """
    try:
        from lightning.pytorch import Callback
    except ImportError:
        from pytorch_lightning import Callback

    steps = _Steps(schedule, freezing, reestimate)

    class QuantizationCallback(Callback):  # type: ignore[misc]
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            steps.before(pl_module, trainer.global_step)

        def on_train_batch_end(
            self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            steps.after(pl_module)

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            steps.end(pl_module)

    return QuantizationCallback()

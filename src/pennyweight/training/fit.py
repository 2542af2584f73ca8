"""A training loop, for those who have none."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sized
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pennyweight.errors import InputError, NonFinite
from pennyweight.graph.record import call
from pennyweight.progress import track
from pennyweight.training.batch_norm import reestimate_batch_norm
from pennyweight.training.distill import distillation_loss
from pennyweight.training.oscillation import OscillationFreezing, dampening_loss
from pennyweight.training.parameters import parameter_groups
from pennyweight.training.schedule import Schedule

Loss = Callable[[Any, Any], Tensor]


@dataclass
class Fit:
    """What `fit` did: mean loss of every epoch, steps, seconds."""

    losses: list[float] = field(default_factory=list)
    steps: int = 0
    seconds: float = 0.0


def fit(
    model: nn.Module,
    batches: Callable[[], Iterable[tuple[Any, Any]]],
    *,
    epochs: int = 1,
    steps_per_epoch: int | None = None,
    lr: float = 0.01,
    momentum: float = 0.9,
    weight_decay: float = 1e-4,
    loss: Loss = F.cross_entropy,
    teacher: nn.Module | None = None,
    distill: float = 1.0,
    temperature: float = 1.0,
    schedule: Schedule | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    amp: bool = False,
    dampening: float = 0.0,
    freezing: tuple[float, float] | None = None,
    reestimate: int = 50,
    progress: bool = True,
) -> Fit:
    """Train a prepared (or a float) model; cosine learning rate to 0, SGD with Nesterov-free momentum.

        L = loss(y, target) + distill * KL_T(teacher(x) || y) + dampening_t * dampening_loss

    Args:
        model: from `prepare`; changed in place.
        batches: makes one epoch's (input, target) pairs; input as `calibrate` takes it.
        steps_per_epoch: batches of an epoch, where what `batches` makes has no length.
        epochs: how often to go through the data.
        lr: greatest learning rate.
        momentum: of SGD.
        weight_decay: of SGD; scales, biases and norms have no decay.
        loss: of output and target.
        teacher: the float model to learn from as well, in eval mode.
        distill: factor of the teacher's term.
        temperature: T of `distillation_loss`.
        schedule: by step; by default ranges freeze after half of the steps, batch-norm statistics after two thirds.
        optimizer: in place of SGD.
        amp: compute in bfloat16 where autocast allows; rounding is exact in either.
        dampening: greatest factor of the oscillation penalty, reached on a cosine.
        freezing: thresholds of `OscillationFreezing` at start and end, on a cosine.
        reestimate: batches for `reestimate_batch_norm` at the end; 0: none.
        progress: show a bar.

    Raises:
        InputError: if there is nothing to train on.
        NonFinite: if the loss is, naming the step.
    """
    done, start = Fit(), time.perf_counter()
    total = epochs * _length(batches, steps_per_epoch)
    if schedule is None:
        schedule = Schedule(freeze_ranges=total // 2, freeze_batch_norm=2 * total // 3)
    if optimizer is None:
        optimizer = torch.optim.SGD(parameter_groups(model, lr, weight_decay), lr, momentum)
    decay = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: 0.5 * (1 + math.cos(math.pi * min(s / total, 1)))
    )
    freezer = None if freezing is None else OscillationFreezing()
    device = next(model.parameters()).device.type
    step = 0
    for epoch in range(epochs):
        model.train()
        sum_, seen = 0.0, 0
        for inputs, target in track(batches(), f"epoch {epoch + 1}/{epochs}", show=progress):
            schedule.apply(model, step)
            with torch.autocast(device, torch.bfloat16, enabled=amp):
                output = call(model, inputs)
                value = loss(output.float() if isinstance(output, Tensor) else output, target)
                if teacher is not None:
                    with torch.no_grad():
                        theirs = call(teacher, inputs)
                    value = value + distill * distillation_loss(output, theirs, temperature)
            if dampening:
                grown = dampening * 0.5 * (1 - math.cos(math.pi * step / total))
                value = value + grown * dampening_loss(model)
            if not bool(torch.isfinite(value.detach())):
                raise NonFinite(
                    f"the loss is {float(value.detach())} at step {step}", hint="Lower the learning rate."
                )
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            decay.step()
            if freezer is not None and freezing is not None:
                share = 0.5 * (1 + math.cos(math.pi * step / total))
                freezer.step(model, freezing[1] + (freezing[0] - freezing[1]) * share)
            sum_, seen, step = sum_ + float(value.detach()), seen + 1, step + 1
        done.losses.append(sum_ / max(seen, 1))
    if reestimate:
        _reestimate(model, batches, reestimate)
    model.eval()
    done.steps, done.seconds = step, time.perf_counter() - start
    return done


def _length(batches: Callable[[], Iterable[tuple[Any, Any]]], steps: int | None) -> int:
    if steps is None:
        made = batches()
        if not isinstance(made, Sized):
            raise InputError(
                "how many batches an epoch has is not known",
                hint="Pass steps_per_epoch, or let `batches` return something with a length, such as a DataLoader.",
            )
        steps = len(made)
    if steps == 0:
        raise InputError("there is no batch to train on", hint="`batches` must make an epoch at every call.")
    return steps


def _reestimate(model: nn.Module, batches: Callable[[], Iterable[tuple[Any, Any]]], count: int) -> None:
    if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()):
        source = (inputs for i, (inputs, _) in zip(range(count), batches(), strict=False) if i < count)
        reestimate_batch_norm(model, source)

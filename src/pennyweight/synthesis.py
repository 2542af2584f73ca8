"""Inputs made up from batch norms, for calibrating where there are no data."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pennyweight.errors import CalibrationError
from pennyweight.graph.record import call
from pennyweight.nn.transformer import take_plain_paths
from pennyweight.passes import clone
from pennyweight.progress import track


def synthesize(
    model: nn.Module,
    example: Tensor,
    *,
    count: int = 64,
    batches: int = 1,
    iterations: int = 500,
    rate: float = 0.5,
    seed: int = 0,
    progress: bool = True,
) -> list[Tensor]:
    """Batches of inputs whose statistics at every batch norm are those the norm has kept from training.

        min_x  sum_l (|mean_l(x) - m_l|^2 + |std_l(x) - d_l|^2) / channels_l  +  mean(x)^2 + (std(x) - 1)^2

    each in units of d_l, over the inputs of all norms l with running mean m and deviation d, starting from normal
    noise, by Adam; the rate falls tenfold where the loss stays for 100 steps. The last terms aim at mean and deviation
    of the example instead of 0 and 1. As good as real data for ranges at 8 bits, not for few bits.

    Args:
        model: a float model; its parameters, statistics and gradients are left as they are.
        example: one batch, for shape and scale of the inputs alone: [n, ...].
        count: inputs a batch.
        batches: how many to make.
        iterations: steps a batch.
        rate: of Adam.
        seed: of the noise.
        progress: show a bar.

    Returns:
        Batches [count, ...] to pass to `quantize` as data.

    Raises:
        CalibrationError: if the model has no batch norm with running statistics, or its input is no floating tensor.

    Source: Cai et al. 2020, "ZeroQ" (arXiv:2001.00281), section 3.1.
    """
    root = clone(model).eval()
    take_plain_paths(root)
    norms = [m for m in root.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    if not norms:
        raise CalibrationError(
            "the model has no batch norm that could say how its inputs looked",
            site=type(model).__name__,
            hint="Calibrate with real inputs; some hundred unlabelled ones are enough.",
        )
    if not isinstance(example, Tensor) or not example.is_floating_point():
        raise CalibrationError("only a single floating tensor can be made up", site=type(model).__name__)
    aim = (float(example.mean()), float(example.std())) if example.numel() > 1 else (0.0, 1.0)
    gen = torch.Generator().manual_seed(seed)
    made: list[Tensor] = []
    bar = iter(track(range(batches * iterations), "synthesize", show=progress))
    for _ in range(batches):
        x = torch.randn((count, *example.shape[1:]), generator=gen) * aim[1] + aim[0]
        made.append(_fit(root, norms, x, aim, iterations, rate, bar))
    return made


def _fit(
    root: nn.Module, norms: list[_BatchNorm], start: Tensor, aim: tuple[float, float], iterations: int, rate: float,
    bar: Any,
) -> Tensor:  # fmt: skip
    """One batch."""
    x = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([x], lr=rate * aim[1])
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=100, min_lr=1e-4 * rate * aim[1])
    losses: list[Tensor] = []

    def before(norm: _BatchNorm, args: tuple[Tensor, ...]) -> None:
        losses.append(_distance(norm, args[0]))

    handles = [norm.register_forward_pre_hook(before) for norm in norms]
    best, least = start, float("inf")
    try:
        for _ in range(iterations):
            losses.clear()
            with torch.enable_grad():
                call(root, x)
                loss = sum(losses, ((x.mean() - aim[0]) / aim[1]) ** 2 + (x.std() / aim[1] - 1) ** 2)
                (x.grad,) = torch.autograd.grad(loss, [x])
            value = float(loss.detach())
            if value < least:
                best, least = x.detach().clone(), value
            optimizer.step()
            plateau.step(value)
            next(bar, 0)
    finally:
        for handle in handles:
            handle.remove()
    return best


def _distance(norm: _BatchNorm, x: Tensor) -> Tensor:
    """Squared distance of a norm's input from its statistics, by channel, in units of its own variance."""
    values = x.movedim(1, -1).flatten(0, -2) if x.ndim > 2 else x
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None
    assert variance is not None
    deviation = torch.sqrt(variance + norm.eps)
    own = torch.sqrt(values.var(0, unbiased=False) + norm.eps)
    return (((values.mean(0) - mean) / deviation) ** 2 + (own / deviation - 1) ** 2).mean()

"""Batch-norm statistics in training: frozen, and estimated anew."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from pennyweight.errors import EmptyCalibration
from pennyweight.graph.record import call
from pennyweight.nn.live_norm import LiveNorm


def freeze_batch_norm(model: nn.Module, frozen: bool = True) -> None:
    """Let every batch norm that will be folded use its running statistics in train mode, or no longer."""
    for module in model.modules():
        if isinstance(module, LiveNorm):
            module.frozen = frozen


def reestimate_batch_norm(model: nn.Module, batches: Iterable[Any]) -> int:
    """Replace running means and variances by their averages over these batches, weights fixed.

        mean <- 1/n sum mean_i,  var <- 1/n sum var_i  (unbiased, as in training)

    Repairs statistics that lag behind weights that oscillate; 50 to 100 batches do. Every other module stays in eval
    mode meanwhile; modes, momentum and everything else are put back.

    Args:
        model: any model with batch norms.
        batches: inputs, as `calibrate` takes them, of the size used in training.

    Returns:
        the number of batch norms.

    Raises:
        EmptyCalibration: if there is no batch.
    Source: Nagel et al. 2022, "Overcoming Oscillations in Quantization-Aware Training" (arXiv:2203.11086), section 3.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    modes = {module: module.training for module in model.modules()}
    momenta = [m.momentum for m in norms]
    frozen = [getattr(m, "frozen", False) for m in norms]
    seen = 0
    try:
        model.eval()
        for norm in norms:
            norm.train()
            norm.momentum = None  # a plain average over the batches
            if isinstance(norm, LiveNorm):
                norm.frozen = False
        with torch.no_grad():
            for batch in batches:
                if seen == 0:
                    for norm in norms:
                        norm.reset_running_stats()
                call(model, batch)
                seen += 1
    finally:
        for norm, momentum, was in zip(norms, momenta, frozen, strict=True):
            norm.momentum = momentum
            if isinstance(norm, LiveNorm):
                norm.frozen = was
        for module, mode in modes.items():
            module.training = mode
    if seen == 0:
        raise EmptyCalibration("there is no batch to estimate batch-norm statistics from")
    return len(norms)

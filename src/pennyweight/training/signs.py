"""Training networks of signs: when weights become signs, how sharp their gradient is, layers that shift them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pennyweight.errors import InputError
from pennyweight.gradients.signs import Signs
from pennyweight.nn.conv import ConvTwin
from pennyweight.nn.fake import Quantizer, WeightQuantizer
from pennyweight.nn.linear import LinearTwin
from pennyweight.nn.rounding import trained
from pennyweight.training.schedule import Schedule


@dataclass(frozen=True)
class SignSchedule(Schedule):
    """`Schedule` with what sites of grid "binary" need beside it. Apply it at the start of every step.

    Activations are signs from step `quantize` on, weights from step `weights` on: the two steps of ReActNet in one run.
    Latent weights are kept in [-clip, clip], where their gradient does not vanish. The slope "ede" sharpens from step 0
    to `total`.

    Args:
        weights: first step at which weights are signs.
        clip: bound of latent weights; 0: none.
        total: steps of the whole training, for "ede".

    Raises:
        InputError: on negative numbers.
    Source: Liu et al. 2020, ReActNet (arXiv:2003.03488), section 5; Courbariaux et al. 2015, BinaryConnect
    (arXiv:1511.00363), section 2.4 (clipping); Qin et al. 2020, IR-Net (arXiv:1909.10788), section 3.3.
    """

    weights: int = 0
    clip: float = 1.0
    total: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("weights", "clip", "total"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} = {getattr(self, name)} is negative", site="SignSchedule")

    def apply(self, model: nn.Module, step: int) -> None:
        """Set every quantizer and batch norm for this step, and clip latent weights.

        Args:
            model: from `prepare`, wrapped or not.
            step: number of the step, from 0.
        """
        super().apply(model, step)
        progress = min(step / self.total, 1.0) if self.total else 0.0
        for module in model.modules():
            if isinstance(module, Quantizer) and module.spec.grid == "binary":
                if isinstance(module, WeightQuantizer):
                    module.active = module.active and step >= self.weights
                if isinstance(module.estimator, Signs) and module.estimator.slope == "ede":
                    module.estimator = dataclasses.replace(module.estimator, progress=progress)
        if self.clip:
            clip_latent_weights(model, self.clip)


def clip_latent_weights(model: nn.Module, bound: float = 1.0) -> None:
    """`w <- clamp(w, -bound, bound)` for every weight of a linear layer or convolution that trains as a sign."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, ConvTwin | LinearTwin):
                quantizer = trained(module).get("weight")
                if quantizer is not None and quantizer.spec.grid == "binary":
                    module.weight.clamp_(-bound, bound)


class RSign(nn.Module):
    """`x + b` with b learned per channel, to stand before a layer of signs: there `sign(x + b)`.

    In the program the shift is part of the threshold. x: [N, C, ...].
    Source: Liu et al. 2020, ReActNet (arXiv:2003.03488), equation 4.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, ...] to the same."""
        return x + self.shift.reshape(-1, *[1] * (x.ndim - 2))


class RPReLU(nn.Module):
    """`y = f(x - a) + b`, f the leaky ReLU of slope c below zero; a, b, c learned per channel. x: [N, C, ...].

    Source: Liu et al. 2020, ReActNet (arXiv:2003.03488), equation 5.
    """

    def __init__(self, channels: int, slope: float = 0.25) -> None:
        super().__init__()
        self.before = nn.Parameter(torch.zeros(channels))
        self.after = nn.Parameter(torch.zeros(channels))
        self.slope = nn.Parameter(torch.full((channels,), slope))

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, ...] to the same."""
        shape = (-1, *[1] * (x.ndim - 2))
        return F.prelu(x - self.before.reshape(shape), self.slope) + self.after.reshape(shape)

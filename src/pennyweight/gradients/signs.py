"""Signs: how weights and activations of one bit are trained."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pennyweight.gradients import estimators
from pennyweight.gradients.lsq import LSQ
from pennyweight.qtensor import QParams, per_block, per_element
from pennyweight.spec import QuantSpec

Slope = Literal["clipped", "approx", "ede", "swish"]


@dataclass(frozen=True)
class Signs(LSQ):
    """`x' = s sign(x)`, sign(0) = 1; s = E|w| per block of a weight as it is now, 1 for activations.

        clipped  dx'/dx = 1 where |x| <= 1, else 0                    Hubara et al. 2016 (arXiv:1602.02830), 1.3
        approx   dx'/dx = max(0, 2 - 2 |x|)                           Liu et al. 2018, Bi-Real (arXiv:1808.00278), 3.3
        ede      dx'/dx = k t (1 - tanh(t x)^2),
                 t = 10^(3 p - 2),  k = max(1 / t, 1)                 Qin et al. 2020, IR-Net (arXiv:1909.10788), 3.3
        swish    dx'/dx = b (2 - b x tanh(b x / 2)) / (1 + cosh(b x)) Darabi et al. 2018, BNN+ (arXiv:1812.11800), 3.1

    Nothing is learned.
    The scale of a weight takes no gradient. Sites on other grids train as under LSQ, so one recipe may mix them.

    Args:
        slope: which of them.
        progress: p of `ede`, from 0 to 1 over training; see `training.SignSchedule`.
        beta: b of `swish`.
    """

    slope: Slope = "clipped"
    progress: float = 0.0
    beta: float = 5.0

    def start(self, params: QParams, spec: QuantSpec) -> dict[str, Tensor]:
        """Nothing for signs."""
        return {} if spec.grid == "binary" else super().start(params, spec)

    def first(self, x: Tensor, spec: QuantSpec) -> QParams:
        """The mean magnitude of every block."""
        if spec.grid != "binary":
            return super().first(x, spec)
        scale = per_block(x.detach().float(), spec.scale_shape(tuple(x.shape))).abs().mean(-1)
        return QParams(torch.where(scale > 0, scale, torch.ones_like(scale)))

    def params(self, held: Mapping[str, Tensor], spec: QuantSpec) -> QParams:
        """As they are."""
        return QParams(held["scale"]) if spec.grid == "binary" else super().params(held, spec)

    def round(self, x: Tensor, held: Mapping[str, Tensor], spec: QuantSpec, count: int) -> Tensor:
        """See the class."""
        if spec.grid != "binary":
            return super().round(x, held, spec, count)
        scale = held["scale"].detach().to(x.dtype)
        if scale.numel() > 1:
            scale = per_element(scale.reshape(spec.scale_shape(tuple(x.shape))), tuple(x.shape))
        # the value is scaled, the gradient is not
        y: Tensor = _Sign.apply(x, scale, self.slope, self.progress, self.beta)  # type: ignore[no-untyped-call]
        return y


def slope_of(x: Tensor, slope: Slope, progress: float, beta: float) -> Tensor:
    """The stand-in for the derivative of the sign, of the shape of x. See `Signs`."""
    if slope == "clipped":
        return (x.abs() <= 1).to(x.dtype)
    if slope == "approx":
        return (
            x.abs().mul_(-2).add_(2).clamp_min_(0)
        )  # in place: the tensors are large, the arithmetic is little
    if slope == "ede":
        t = temperature(progress)
        return max(1 / t, 1.0) * t * (1 - torch.tanh(t * x) ** 2)
    z = (beta * x).clamp(-80, 80)
    return beta * (2 - z * torch.tanh(z / 2)) / (1 + torch.cosh(z))


class _Sign(torch.autograd.Function):
    """`scale sign(x)` with sign(0) = 1, and the gradient of `slope_of`."""

    @staticmethod
    def forward(ctx: object, x: Tensor, scale: Tensor, slope: Slope, progress: float, beta: float) -> Tensor:
        ctx.save_for_backward(x)  # type: ignore[attr-defined]
        ctx.options = (slope, progress, beta)  # type: ignore[attr-defined]
        return torch.where(x >= 0, scale, -scale)

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        (x,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return slope_of(x, *ctx.options).mul_(grads[0]), None, None, None, None  # type: ignore[attr-defined]


def temperature(progress: float) -> float:
    """t of `ede`: from 0.01 to 10 as progress goes from 0 to 1."""
    return math.pow(10.0, 3 * progress - 2)


estimators.add("signs", Signs())

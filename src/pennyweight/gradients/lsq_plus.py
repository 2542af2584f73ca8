"""LSQ+: step size and offset are learned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pennyweight.formats import grids
from pennyweight.gradients import estimators
from pennyweight.gradients.affine import bounds, lsq_gain, rounded
from pennyweight.gradients.lsq import LSQ
from pennyweight.qtensor import QParams, per_block
from pennyweight.spec import QuantSpec


@dataclass(frozen=True)
class LSQPlus(LSQ):
    """Learned step size and zero point, for activations that are negative as well, such as those of swish and GELU.

        x' = (clamp(rint(x / s) + z, qmin, qmax) - z) s,  z = rint(zeta)
        dx'/dzeta = 0 inside, -g s outside; dx'/ds as in LSQ
        weights start at s0 = max(|mu - 3 sigma|, |mu + 3 sigma|) / 2^(b-1)

    The paper learns an offset beta = -s z in the units of x; here it is the zero point itself, which is a whole number
    at conversion, so that zero keeps its code.

    Source: Bhalgat et al. 2020, "LSQ+" (arXiv:2004.09576), sections 3.1 and 3.2.
    """

    learns: ClassVar[tuple[str, ...]] = ("scale", "zero")

    def start(self, params: QParams, spec: QuantSpec) -> dict[str, Tensor]:
        """Step and, where the grid has one, zero point."""
        held = {"scale": params.scale.detach().clone()}
        if params.zero is not None:
            held["zero"] = params.zero.detach().float().clone()
        return held

    def first(self, x: Tensor, spec: QuantSpec) -> QParams:
        """Three standard deviations around the mean where there is no zero point."""
        if spec.zero != "none":
            return super().first(x, spec)
        blocks = per_block(x.detach().float(), spec.scale_shape(tuple(x.shape)))
        mean, spread = blocks.mean(-1), 3.0 * blocks.std(-1, correction=0)
        ends = torch.maximum((mean - spread).abs(), (mean + spread).abs())
        return QParams((ends / 2.0 ** (grids[spec.grid].bits - 1)).clamp_min(1e-12))

    def params(self, held: Mapping[str, Tensor], spec: QuantSpec) -> QParams:
        """The zero point rounded and within the grid."""
        low, high = bounds(spec)
        zero = None if spec.zero == "none" else torch.round(held["zero"]).clamp(low, high)
        return QParams(held["scale"], zero)

    def round(self, x: Tensor, held: Mapping[str, Tensor], spec: QuantSpec, count: int) -> Tensor:
        """See the class."""
        zero = None
        if spec.zero != "none":
            low, high = bounds(spec)
            zeta = held["zero"].clamp(low, high)
            zero = zeta + (torch.round(zeta) - zeta).detach()
        return rounded(x, held["scale"], zero, spec, gain=lsq_gain(spec, count))


estimators.add("lsq+", LSQPlus())

"""LSQ: the step size is learned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from pennyweight.gradients import estimators
from pennyweight.gradients.affine import lsq_gain, mean_magnitude, rounded, zero_of
from pennyweight.gradients.clipped import Clipped
from pennyweight.qtensor import QParams
from pennyweight.spec import QuantSpec


@dataclass(frozen=True)
class LSQ(Clipped):
    """Learned step size.

        x' = s rint(clamp(x / s, -Q_N, Q_P))
        dx'/ds = g (rint(x / s) - x / s) inside, -g Q_N below, g Q_P above;  g = 1 / sqrt(N Q_P)
        s0 = 2 E|x| / sqrt(Q_P), or the calibrated scale

    N: weights that share the step, or features of one sample. A zero point, where the grid has one, stays as it was
    calibrated. The step is used as max(|s|, 1e-12).

    Args:
        calibrated: start from the calibrated range rather than from the mean magnitude.

    Source: Esser et al. 2020, "Learned Step Size Quantization" (arXiv:1902.08153), section 2.
    """

    calibrated: bool = True
    learns: ClassVar[tuple[str, ...]] = ("scale",)

    def start(self, params: QParams, spec: QuantSpec) -> dict[str, Tensor]:
        """The step, from the range."""
        return {"scale": params.scale.detach().clone()}

    def first(self, x: Tensor, spec: QuantSpec) -> QParams:
        """From the mean magnitude."""
        return mean_magnitude(x, spec)

    def round(self, x: Tensor, held: Mapping[str, Tensor], spec: QuantSpec, count: int) -> Tensor:
        """See the class."""
        return rounded(x, held["scale"], zero_of(held, spec), spec, gain=lsq_gain(spec, count))


estimators.add("lsq", LSQ())

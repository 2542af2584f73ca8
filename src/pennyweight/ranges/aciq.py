"""Analytic clipping: the best clip of a Laplace or Gauss distribution, in closed form."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import ClassVar, Literal, cast

import torch

from pennyweight.formats import grids
from pennyweight.qtensor import QParams
from pennyweight.ranges import params_of_range, ranges
from pennyweight.spec import QuantSpec
from pennyweight.stats import Distribution, Statistic


def clip_error(alpha: float, bits: int, prior: str) -> float:
    """Expected squared error of clipping a unit-scale variable at +-alpha and rounding it to `2^bits` levels.

        Laplace(b = 1):    2 e^-a + a^2 / (3 * 4^M)
        Gauss(sigma = 1):  (1 + a^2) (1 - erf(a / sqrt 2)) - sqrt(2 / pi) a e^(-a^2 / 2) + a^2 / (3 * 4^M)

    Source: Banner et al. 2019 (arXiv:1810.05723), equations 5 and 9.
    """
    rounding = alpha * alpha / (3 * 4.0**bits)
    if prior == "laplace":
        return 2 * math.exp(-alpha) + rounding
    tail = (1 + alpha * alpha) * (1 - math.erf(alpha / math.sqrt(2)))
    return tail - math.sqrt(2 / math.pi) * alpha * math.exp(-alpha * alpha / 2) + rounding


@cache
def best_alpha(bits: int, prior: str) -> float:
    """`argmin_a clip_error(a)` by golden-section search; in units of b = E|x - mean| or of sigma.

    >>> round(best_alpha(4, "laplace"), 2), round(best_alpha(4, "gauss"), 2)
    (5.03, 2.56)
    """
    ratio = (math.sqrt(5) - 1) / 2
    low, high = 0.1, 40.0
    while high - low > 1e-7:
        a, b = high - ratio * (high - low), low + ratio * (high - low)
        if clip_error(a, bits, prior) < clip_error(b, bits, prior):
            high = b
        else:
            low = a
    return (low + high) / 2


@ranges.register("aciq")
@dataclass(frozen=True)
class ACIQ:
    """Clip at `mean +- alpha(bits) * deviation`; one-sided data (after a ReLU) use the alpha of one bit more.

    Args:
        prior: "laplace" (deviation E|x - mean|), "gauss" (standard deviation), or "auto": Laplace where the kurtosis
            is nearer to 6 than to 3.
    Source: Banner et al. 2019 (arXiv:1810.05723), section 2.
    """

    prior: Literal["laplace", "gauss", "auto"] = "auto"
    needs: ClassVar[str] = "histogram"

    def __call__(self, stat: Statistic, spec: QuantSpec) -> QParams:
        """Parameters of the clipped range. Raises NonFinite on bounds that are not numbers."""
        values, weights = cast("Distribution", stat).support()
        if values.shape[-1] == 0:
            return params_of_range(stat.lo, stat.hi, spec)
        one_sided = stat.lo >= 0
        values, weights = values.double(), weights.double()
        # a ReLU's output is half of a symmetric distribution: fit that one, around zero
        total = weights.sum(-1)
        mean = torch.where(one_sided, torch.zeros_like(total), (values * weights).sum(-1) / total)
        centred = values - mean.unsqueeze(-1)
        used = torch.where(one_sided.unsqueeze(-1) & (values <= 0), torch.zeros_like(weights), weights)
        n = used.sum(-1).clamp(min=1)
        second = (centred**2 * used).sum(-1) / n
        deviation = (centred.abs() * used).sum(-1) / n
        kurtosis = (centred**4 * used).sum(-1) / n / second.clamp(min=1e-60) ** 2
        laplace = {"laplace": torch.ones_like(kurtosis, dtype=torch.bool), "gauss": kurtosis > math.inf}.get(
            self.prior, kurtosis > 4.5
        )
        bits = grids[spec.grid].bits

        def reach(extra: int) -> torch.Tensor:
            by_laplace = best_alpha(bits + extra, "laplace") * deviation
            return torch.where(laplace, by_laplace, best_alpha(bits + extra, "gauss") * second.sqrt())

        alpha = torch.where(one_sided, reach(1), reach(0))
        lo = torch.maximum(stat.lo, (mean - alpha).float())
        hi = torch.minimum(stat.hi, (mean + alpha).float())
        return params_of_range(lo, hi, spec)

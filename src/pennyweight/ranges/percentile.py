"""Clip a fixed share of the values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, cast

import torch

from pennyweight.qtensor import QParams
from pennyweight.ranges import params_of_range, ranges
from pennyweight.spec import QuantSpec
from pennyweight.stats import Distribution, Statistic


@ranges.register("percentile")
@dataclass(frozen=True)
class Percentile:
    """`[Q(1 - p), Q(p)]`: the values outside, a share of `1 - p` on each side, are clipped.

    Args:
        p: in (0.5, 1]; 1 is the whole range.
    Source: Wu et al. 2020 (arXiv:2004.09602), section 3.3 "percentile".
    """

    p: float = 0.9999
    needs: ClassVar[str] = "histogram"

    def __call__(self, stat: Statistic, spec: QuantSpec) -> QParams:
        """Parameters of the percentile range. Raises NonFinite on bounds that are not numbers."""
        values, weights = cast("Distribution", stat).support()
        if self.p >= 1 or values.shape[-1] == 0:
            return params_of_range(stat.lo, stat.hi, spec)
        order = values.sort(-1)
        weights = weights.gather(-1, order.indices).double().cumsum(-1)
        share = weights / weights[..., -1:]
        last = values.shape[-1] - 1
        below = (share <= 1 - self.p).sum(-1, keepdim=True).clamp(max=last)  # first value past the lower tail
        above = (share < self.p).sum(-1, keepdim=True).clamp(max=last)
        lo = order.values.gather(-1, below).squeeze(-1)
        hi = order.values.gather(-1, above).squeeze(-1)
        return params_of_range(torch.maximum(lo, stat.lo), torch.minimum(hi, stat.hi), spec)

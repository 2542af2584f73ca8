"""The whole range that was seen, or an average of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pennyweight.qtensor import QParams
from pennyweight.ranges import params_of_range, ranges
from pennyweight.spec import QuantSpec
from pennyweight.stats import Statistic


@ranges.register("minmax")
@dataclass(frozen=True)
class MinMax:
    """`[min x, max x]`: nothing is clipped, one outlier widens every step."""

    needs: ClassVar[str] = "minmax"

    def __call__(self, stat: Statistic, spec: QuantSpec) -> QParams:
        """Parameters of the extremes. Raises NonFinite on bounds that are not numbers."""
        return params_of_range(stat.lo, stat.hi, spec)


@ranges.register("mean_minmax")
@dataclass(frozen=True)
class MeanMinMax(MinMax):
    """The extremes of each sample, averaged over the samples."""

    needs: ClassVar[str] = "mean_minmax"


@ranges.register("moving_minmax")
@dataclass(frozen=True)
class MovingMinMax(MinMax):
    """The extremes of each batch, exponentially averaged."""

    needs: ClassVar[str] = "moving_minmax"

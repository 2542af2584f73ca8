"""Scales that are powers of two, so that scaling is a shift."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from pennyweight.errors import SpecError
from pennyweight.formats import grids
from pennyweight.qtensor import QParams
from pennyweight.ranges import params_of_range, ranges
from pennyweight.spec import QuantSpec
from pennyweight.stats import Statistic


@ranges.register("power_of_two")
@dataclass(frozen=True)
class PowerOfTwo:
    """The scale of the extremes, rounded to a power of two.

        up       s = 2^ceil(log2 t)      nothing is clipped: fixed point with the fewest integer bits
        down     s = 2^floor(log2 t)
        nearest  s = 2^rint(log2 t)
        inq      s = 2^floor(log2(4/3 max|x|)): with the grids pot3 .. pot5 the sets of INQ

    t is the scale that `minmax` gives. Zero points follow the rounded scale.
    Source: Gysel et al. 2018 (arXiv:1604.03168), section 4; Zhou et al. 2017 (arXiv:1702.03044), equation 3.
    """

    rounding: Literal["up", "down", "nearest", "inq"] = "up"
    needs: ClassVar[str] = "minmax"

    def __call__(self, stat: Statistic, spec: QuantSpec) -> QParams:
        """Scales of the statistic's blocks.

        Raises:
            SpecError: on an unknown rounding, or a zero point.
            NonFinite: on bounds that are not numbers.
        """
        if spec.zero != "none":
            raise SpecError("scales that are powers of two have no zero point here", spec=str(spec))
        found = params_of_range(stat.lo, stat.hi, spec).scale.double()
        if self.rounding == "inq":
            found = found * float(grids[spec.grid].levels().abs().max()) * (4 / 3)
        steps = {"up": torch.ceil, "down": torch.floor, "nearest": torch.round, "inq": torch.floor}
        if self.rounding not in steps:
            raise SpecError(f"rounding {self.rounding!r} is unknown", hint=f"One of {sorted(steps)}.")
        return QParams(torch.exp2(steps[self.rounding](torch.log2(found))).float())

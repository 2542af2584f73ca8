"""Dynamic fixed point: integer bits from the greatest magnitude, the rest of the width is fraction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from pennyweight.errors import NonFinite, SpecError
from pennyweight.formats import grids
from pennyweight.formats.integer import Integer
from pennyweight.qtensor import QParams
from pennyweight.ranges import TINY, ranges
from pennyweight.spec import QuantSpec
from pennyweight.stats import Statistic


@ranges.register("fixed_point")
@dataclass(frozen=True)
class FixedPoint:
    """`s = 2^-FL`, `FL = bits - IL`, `IL = ceil(log2 max|x|) + headroom`, sign included.

    FL may be negative, or greater than the bits. A block of zeros has scale 1.

    Args:
        headroom: 1 covers all values, as for parameters; 0 is one bit short on purpose, as for activations: the
            greatest saturate, and all others gain a bit.
    Source: Gysel et al. 2018 (arXiv:1604.03168), section 4.1; pmgysel/caffe, `src/caffe/ristretto/quantization.cpp`.
    """

    headroom: int = 0
    needs: ClassVar[str] = "minmax"

    def __call__(self, stat: Statistic, spec: QuantSpec) -> QParams:
        """Scales of the statistic's blocks.

        Raises:
            SpecError: on a grid that is not of signed integers, or a zero point.
            NonFinite: on bounds that are not numbers.
        """
        grid = grids[spec.grid]
        if spec.zero != "none" or not isinstance(grid, Integer) or grid.qmin >= 0:
            raise SpecError(
                "fixed point is of signed integers without zero point", spec=str(spec), hint="Use int8[*]."
            )
        most = torch.maximum(-stat.lo, stat.hi).double()
        if not bool(torch.isfinite(most).all()):
            raise NonFinite("a range has NaN or infinite bounds", spec=str(spec))
        fraction, exponent = torch.frexp(most)
        integer = exponent - (fraction == 0.5).to(exponent.dtype) + self.headroom  # ceil(log2), exactly
        scale = torch.exp2((integer - grid.bits).double())
        return QParams(torch.where((most == 0) | (scale < TINY), torch.ones_like(scale), scale).float())

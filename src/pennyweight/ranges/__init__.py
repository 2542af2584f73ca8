"""Range rules: from a statistic to scales and zero points. One file per rule.

A rule is a frozen dataclass of options with `needs`, the statistic it reads, and a call `(statistic, spec) -> QParams`
whose scales have the shape of the statistic's blocks.
"""

from __future__ import annotations

from typing import ClassVar, Protocol, cast

import torch
from torch import Tensor

from pennyweight.errors import NonFinite, SpecError
from pennyweight.formats import grids
from pennyweight.formats.integer import Integer
from pennyweight.qtensor import QParams
from pennyweight.registry import Registry
from pennyweight.spec import QuantSpec
from pennyweight.stats import Statistic

TINY = 1e-30  # scales below have no finite float32 reciprocal times a code


class RangeRule(Protocol):
    """Chooses the range that the codes cover."""

    needs: ClassVar[str]

    def __call__(self, stat: Statistic, spec: QuantSpec) -> QParams:
        """Scales and zero points for what `stat` has seen."""
        ...


ranges: Registry[type[RangeRule]] = Registry("range rules", "pennyweight.ranges")


def params_of_range(lo: Tensor, hi: Tensor, spec: QuantSpec) -> QParams:
    """Scale and zero point of the range [lo, hi], widened to hold zero.

        integer zero:  s = (hi - lo) / (qmax - qmin),  z = clamp(qmin - rint(lo / s), qmin, qmax)
        float zero:    same s,  z = qmin - lo / s
        no zero:       s = max(lo / qmin, hi / qmax) over the sides the grid has; other grids  s = max|x| / max|level|

    An empty range gives scale 1. Shapes: lo, hi and both results alike.

    Raises:
        NonFinite: on NaN or infinite bounds.
        SpecError: on a zero point for a grid whose levels are not consecutive integers.
    Source: Jacob et al. 2018 (arXiv:1712.05877), equation 1 and section 3.
    """
    if not bool(torch.isfinite(lo).all() & torch.isfinite(hi).all()):
        raise NonFinite("a range has NaN or infinite bounds", spec=str(spec))
    grid = grids[spec.grid]
    lo, hi = lo.clamp(max=0.0).double(), hi.clamp(min=0.0).double()
    zero: Tensor | None = None
    if not grid.affine:
        if spec.zero != "none":
            raise SpecError("a zero point needs a grid of consecutive integers", spec=str(spec))
        scale = torch.maximum(-lo, hi) / float(grid.levels().abs().max())
        return QParams(_usable(scale).float())
    integer = cast("Integer", grid)
    if spec.zero == "none":
        sides = [hi / integer.qmax] + ([lo / integer.qmin] if integer.qmin < 0 else [])
        return QParams(_usable(torch.stack(sides).amax(0)).float())
    scale = _usable((hi - lo) / (integer.qmax - integer.qmin)).float()
    zero = integer.qmin - lo / scale.double()
    if spec.zero == "int":
        zero = torch.round(zero).clamp(integer.qmin, integer.qmax)
    return QParams(scale, zero.float())


def _usable(scale: Tensor) -> Tensor:
    return torch.where(scale < TINY, torch.ones_like(scale), scale)

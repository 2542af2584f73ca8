"""The mean magnitude as the scale: binary and ternary weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, cast

import torch

from pennyweight.errors import NonFinite, SpecError
from pennyweight.qtensor import QParams
from pennyweight.ranges import TINY, ranges
from pennyweight.spec import QuantSpec
from pennyweight.stats import Distribution, Statistic


@ranges.register("absmean")
@dataclass(frozen=True)
class AbsMean:
    """`s = E|x|` per block: the least-squares scale of `sign(x)`, and the ternary scale of BitNet b1.58.

    Source: Rastegari et al. 2016 (arXiv:1603.05279), equation 6; Ma et al. 2024 (arXiv:2402.17764), equations 1 to 3.
    """

    needs: ClassVar[str] = "histogram"

    def __call__(self, stat: Statistic, spec: QuantSpec) -> QParams:
        """Scales of the statistic's blocks.

        Raises:
            SpecError: on a spec with a zero point.
            NonFinite: on bounds that are not numbers.
        """
        if spec.zero != "none":
            raise SpecError("the mean magnitude leaves no place for a zero point", spec=str(spec))
        if not bool(torch.isfinite(stat.lo).all() & torch.isfinite(stat.hi).all()):
            raise NonFinite("a range has NaN or infinite bounds", spec=str(spec))
        values, weights = cast("Distribution", stat).support()
        total = weights.double().sum(-1)
        scale = (values.double().abs() * weights.double()).sum(-1) / torch.where(total > 0, total, 1.0)
        return QParams(torch.where(scale < TINY, torch.ones_like(scale), scale).float())

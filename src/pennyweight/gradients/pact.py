"""PACT: the clipping point of an activation is learned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from pennyweight.gradients import Role, estimators
from pennyweight.gradients.affine import CLIP, extremes, rounded, zero_of
from pennyweight.gradients.lsq import LSQ
from pennyweight.qtensor import QParams
from pennyweight.spec import QuantSpec


@dataclass(frozen=True)
class PACT(LSQ):
    """Learned clipping of activations.

        y = clamp(x, 0, alpha), rounded in steps of s = alpha / (qmax - z)
        dy/dalpha = 1 where x >= alpha, 0 elsewhere

    alpha lives in the step, so that the gradient of s is that of alpha times (qmax - z); on grids with negative codes
    the lower end clips and learns likewise. The paper adds an L2 penalty on alpha: give the quantizers' parameters
    a weight decay (`training.parameter_groups`).

    Source: Choi et al. 2018, "PACT" (arXiv:1805.06085), section 3.
    """

    serves: ClassVar[frozenset[Role]] = frozenset({"input"})

    def first(self, x: Tensor, spec: QuantSpec) -> QParams:
        """The extremes of the first batch."""
        return extremes(x, spec)

    def round(self, x: Tensor, held: Mapping[str, Tensor], spec: QuantSpec, count: int) -> Tensor:
        """See the class."""
        return rounded(x, held["scale"], zero_of(held, spec), spec, learns=CLIP)


estimators.add("pact", PACT())

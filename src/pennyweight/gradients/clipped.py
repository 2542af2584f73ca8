"""The clipped straight-through estimator under ranges that follow what is seen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from pennyweight.gradients import Role, estimators
from pennyweight.gradients.affine import extremes, rounded, zero_of
from pennyweight.qtensor import QParams
from pennyweight.spec import QuantSpec


@dataclass(frozen=True)
class Clipped:
    """Nothing is learned but the weights: `dx'/dx = 1` inside of the range, 0 outside.

    Ranges of weights are their extremes at every step, those of inputs the moving average of the batches' extremes,
    until a `Schedule` freezes them.

    Args:
        calibrated: weights start from the range that the solver found: what stays if ranges are frozen from step 0.

    Source: Jacob et al. 2018 (arXiv:1712.05877), section 3.
    """

    calibrated: bool = False
    serves: ClassVar[frozenset[Role]] = frozenset({"weight", "input"})
    learns: ClassVar[tuple[str, ...]] = ()

    def start(self, params: QParams, spec: QuantSpec) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def first(self, x: Tensor, spec: QuantSpec) -> QParams:
        """The extremes."""
        return extremes(x, spec)

    def params(self, held: Mapping[str, Tensor], spec: QuantSpec) -> QParams:
        """As they are."""
        return QParams(held["scale"], zero_of(held, spec))

    def round(self, x: Tensor, held: Mapping[str, Tensor], spec: QuantSpec, count: int) -> Tensor:
        """See `affine.rounded`."""
        return rounded(x, held["scale"], zero_of(held, spec), spec)

    def latent(self, x: Tensor) -> Tensor:
        """The weight itself."""
        return x


estimators.add("clipped", Clipped())

"""TQT: power-of-two scales whose logarithm is learned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pennyweight.gradients import estimators
from pennyweight.gradients.affine import positive_bound, rounded, zero_of
from pennyweight.gradients.lsq import LSQ
from pennyweight.qtensor import QParams
from pennyweight.spec import QuantSpec


@dataclass(frozen=True)
class TQT(LSQ):
    """Trained quantization thresholds: scales are powers of two, for hardware that shifts.

        s = 2^ceil(log2 t) / Q_P,  t = 2^theta the threshold, theta is learned; ceil is straight-through
        dL/dtheta = s ln 2 dL/ds, with dx'/ds as in LSQ without its factor

    Q_P is taken as the power of two above it, so that s is one as well.

    Source: Jain et al. 2019, "Trained Quantization Thresholds" (arXiv:1903.08066), section 3.
    """

    learns: ClassVar[tuple[str, ...]] = ("log_threshold",)

    def _steps(self, spec: QuantSpec) -> float:
        return float(2 ** torch.ceil(torch.log2(torch.tensor(positive_bound(spec)))).item())

    def start(self, params: QParams, spec: QuantSpec) -> dict[str, Tensor]:
        """The logarithm of the calibrated threshold."""
        return {"log_threshold": torch.log2(params.scale.detach() * self._steps(spec))}

    def _scale(self, held: Mapping[str, Tensor], spec: QuantSpec) -> Tensor:
        theta = held["log_threshold"]
        whole = theta + (torch.ceil(theta) - theta).detach()
        return torch.exp2(whole) / self._steps(spec)

    def params(self, held: Mapping[str, Tensor], spec: QuantSpec) -> QParams:
        """A power of two."""
        return QParams(self._scale(held, spec), zero_of(held, spec))

    def round(self, x: Tensor, held: Mapping[str, Tensor], spec: QuantSpec, count: int) -> Tensor:
        """See the class."""
        return rounded(x, self._scale(held, spec), zero_of(held, spec), spec)


estimators.add("tqt", TQT())

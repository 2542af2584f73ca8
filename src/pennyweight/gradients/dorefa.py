"""DoReFa: weights through tanh, activations clipped to [0, 1]."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pennyweight.gradients import estimators
from pennyweight.gradients.affine import positive_bound, rounded, zero_of
from pennyweight.gradients.clipped import Clipped
from pennyweight.qtensor import QParams
from pennyweight.spec import QuantSpec


@dataclass(frozen=True)
class DoReFa(Clipped):
    """Weights are squashed, then rounded in fixed steps of their range [-1, 1]. Meant to be followed by batch norm.

        u = tanh(w) / max |tanh(w)|,  w' = rint(Q_P u) / Q_P,  max over the whole weight, a constant to the gradient

    The levels are those of the spec's grid, zero among them; the paper's lie half a step beside. Activations, which the
    paper clips to [0, 1], are rounded under a moving-average range as `clipped` does.

    Source: Zhou et al. 2016, "DoReFa-Net" (arXiv:1606.06160), sections 2.3 and 2.4.
    """

    serves: ClassVar = frozenset({"weight"})

    def first(self, x: Tensor, spec: QuantSpec) -> QParams:
        """`1 / Q_P`, whatever x."""
        shape = spec.scale_shape(tuple(x.shape))
        return QParams(torch.full(shape, 1.0 / positive_bound(spec), device=x.device))

    def round(self, x: Tensor, held: Mapping[str, Tensor], spec: QuantSpec, count: int) -> Tensor:
        """See the class."""
        return rounded(self.latent(x), held["scale"], zero_of(held, spec), spec)

    def latent(self, x: Tensor) -> Tensor:
        """u of the class."""
        squashed = torch.tanh(x)
        return squashed / squashed.detach().abs().amax().clamp_min(1e-12)


estimators.add("dorefa", DoReFa())

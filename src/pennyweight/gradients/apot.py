"""APoT: weights are normalised before they are clipped, and the clipping point is learned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pennyweight.gradients import Role, estimators
from pennyweight.gradients.affine import positive_bound, rounded, zero_of
from pennyweight.gradients.lsq import LSQ
from pennyweight.qtensor import QParams
from pennyweight.spec import QuantSpec


@dataclass(frozen=True)
class APoT(LSQ):
    """Learned clipping of normalised weights, on any grid. Meant to be followed by batch norm, which takes the size in.

        u = (w - mean w) / deviation w,  over the whole weight, constants to the gradient
        w' = a L(u / a),  L the nearest level of the grid (greatest: Q_P, 1 for sums of powers), a0 = alpha / Q_P
        dw'/da = L(u / a) - u / a inside, the extreme level outside;  dw'/du = 1 inside, 0 outside

    Normalised weights keep a where it is while the weights wander. Conversion stores the levels of u under the scale a:
    mean and deviation are gone. Without `normalize` u is w, and a starts from the mean magnitude as in LSQ.

    Args:
        normalize: see above.
        alpha: where normalised weights are clipped at first.
        calibrated: start from the calibrated range; without `normalize` alone.

    Source: Li et al. 2020, "Additive Powers-of-Two Quantization" (arXiv:1909.13144), sections 3.2 and 3.3.
    """

    calibrated: bool = False
    normalize: bool = True
    alpha: float = 3.0
    serves: ClassVar[frozenset[Role]] = frozenset({"weight"})

    def start(self, params: QParams, spec: QuantSpec) -> dict[str, Tensor]:
        """The range; of normalised weights always the same, whatever was found for the weights as they are."""
        if not self.normalize:
            return super().start(params, spec)
        return {"scale": torch.full_like(params.scale, self.alpha / positive_bound(spec))}

    def first(self, x: Tensor, spec: QuantSpec) -> QParams:
        """`alpha / Q_P`, whatever x, where it is normalised."""
        if not self.normalize:
            return super().first(x, spec)
        shape = spec.scale_shape(tuple(x.shape))
        return QParams(torch.full(shape, self.alpha / positive_bound(spec), device=x.device))

    def round(self, x: Tensor, held: Mapping[str, Tensor], spec: QuantSpec, count: int) -> Tensor:
        """See the class."""
        if not self.normalize:
            return super().round(x, held, spec, count)
        return rounded(self.latent(x), held["scale"], zero_of(held, spec), spec)

    def latent(self, x: Tensor) -> Tensor:
        """u of the class; a weight of one value becomes zero."""
        if not self.normalize:
            return x
        constant = x.detach()
        deviation = constant.std() if constant.numel() > 1 else torch.zeros_like(constant).sum()
        return (x - constant.mean()) / deviation.clamp_min(1e-12)


estimators.add("apot", APoT())

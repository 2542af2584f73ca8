"""EWGS: gradients are scaled by how far a value is from its code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from pennyweight.gradients import estimators
from pennyweight.gradients.affine import lsq_gain, rounded, zero_of
from pennyweight.gradients.lsq import LSQ
from pennyweight.spec import QuantSpec


@dataclass(frozen=True)
class EWGS(LSQ):
    """Element-wise gradient scaling over a learned step.

        dL/dx = g (1 + delta sign(g) (x / s - rint(x / s))) inside, 0 outside;  dL/ds as in LSQ

    The paper normalises by learned ends l and u; a step and a fixed zero point are the same range. Its Hessian rule for
    delta is left out: a constant does as well there (table 4).

    Args:
        delta: strength; 0 is LSQ.

    Source: Lee et al. 2021, "Network Quantization with Element-wise Gradient Scaling" (arXiv:2104.00903), section 3.2.
    """

    delta: float = 1e-3

    def round(self, x: Tensor, held: Mapping[str, Tensor], spec: QuantSpec, count: int) -> Tensor:
        """See the class."""
        gain = lsq_gain(spec, count)
        return rounded(x, held["scale"], zero_of(held, spec), spec, gain=gain, delta=self.delta)


estimators.add("ewgs", EWGS())

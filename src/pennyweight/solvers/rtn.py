"""Round to nearest: every weight alone."""

from __future__ import annotations

import torch
from torch import Tensor

from pennyweight.errors import NonFinite
from pennyweight.qtensor import QTensor, quantize
from pennyweight.ranges import RangeRule
from pennyweight.solvers import solvers
from pennyweight.spec import QuantSpec
from pennyweight.stats.values import Values


@solvers.register("rtn")
def rtn(weight: Tensor, spec: QuantSpec, rule: RangeRule) -> QTensor:
    """`q = clamp(rint(w / s) + z)` with s and z from `rule` on the exact values of each block.

    Shapes: weight [out, in]; codes [out, in]; scales `spec.scale_shape`.
    Cost: one pass over the weight times the candidates of the rule.

    Raises:
        NonFinite: if the weight holds NaN or infinity.
        SpecError: if the spec does not fit the shape.
    """
    if not bool(torch.isfinite(weight).all()):
        raise NonFinite("the weight holds NaN or infinity", spec=str(spec), shapes=str(tuple(weight.shape)))
    return quantize(weight, spec, rule(Values.of(weight, spec), spec))

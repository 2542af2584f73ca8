"""Ternary weights by a threshold."""

from __future__ import annotations

import torch
from torch import Tensor

from pennyweight.errors import NonFinite, SpecError
from pennyweight.formats import grids
from pennyweight.qtensor import QTensor, per_block, unblock
from pennyweight.ranges import RangeRule
from pennyweight.solvers import solvers
from pennyweight.spec import QuantSpec


@solvers.register("twn")
def twn(weight: Tensor, spec: QuantSpec, rule: RangeRule) -> QTensor:
    """`w' = a sign(w) [|w| > D]`, `D = 0.7 E|w|`, `a = E[|w| : |w| > D]` per block; the rule is not asked.

    Shapes: weight [out, in]; codes [out, in]; scales `spec.scale_shape`.
    Source: Li et al. 2016 (arXiv:1605.04711), equations 5 and 6.

    Raises:
        SpecError: for another grid than ternary, or a zero point.
        NonFinite: if the weight holds NaN or infinity.
    """
    if grids[spec.grid].levels().tolist() != [-1.0, 0.0, 1.0] or spec.zero != "none":
        raise SpecError("this solver is for ternary weights", spec=str(spec), hint="Use ternary[1,*].")
    if not bool(torch.isfinite(weight).all()):
        raise NonFinite("the weight holds NaN or infinity", spec=str(spec), shapes=str(tuple(weight.shape)))
    shape = spec.scale_shape(tuple(weight.shape))
    blocks = per_block(weight.float(), shape)
    size = blocks.abs()
    kept = size > 0.7 * size.mean(-1, keepdim=True)
    count = kept.sum(-1)
    scale = (size * kept).sum(-1) / count.clamp_min(1)
    scale = torch.where(count > 0, scale, torch.ones_like(scale))
    codes = unblock(torch.sign(blocks) * kept, shape, tuple(weight.shape))
    return QTensor(codes.to(torch.int8), scale, None, spec)

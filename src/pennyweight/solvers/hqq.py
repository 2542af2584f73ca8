"""Half-quadratic quantization: parameters that forgive outliers, without data and without gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from pennyweight.errors import NonFinite, SpecError
from pennyweight.formats import grids
from pennyweight.formats.integer import Integer
from pennyweight.qtensor import QParams, QTensor, per_block, quantize
from pennyweight.ranges import RangeRule
from pennyweight.solvers import solvers
from pennyweight.spec import QuantSpec
from pennyweight.stats.values import Values


@solvers.register("hqq")
def hqq(
    weight: Tensor,
    spec: QuantSpec,
    rule: RangeRule,
    *,
    power: float = 0.7,
    beta: float = 10.0,
    growth: float = 1.01,
    steps: int = 20,
) -> QTensor:
    """Minimise `sum |w - w'|^p`, p < 1, by half-quadratic splitting, from the parameters of `rule`. Alternately

        q = clamp(rint(w / s + z)),  e = shrink(w - (q - z) s),  shrink(d) = sign(d) max(0, |d| - |d|^(p - 1) / beta)
        z = mean(q - (w - e) / s)                       with a zero point that need not be whole, as published
        s = sum (w - e)(q - z) / sum (q - z)^2          else: the scale is what is left to choose

    per block, beta growing; each block keeps the parameters of its least `sum |w - w'|^p`. beta is relative to the
    steps of weights whose blocks have unit deviation.

    Shapes: weight [out, in]; codes [out, in]; scales `spec.scale_shape`.
    Source: Badri and Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models". The second form is
    ours.

    Raises:
        NonFinite: if the weight holds NaN or infinity.
        SpecError: for grids that are no integers.
    """
    grid = grids[spec.grid]
    if not isinstance(grid, Integer):
        raise SpecError("half-quadratic parameters are for integers", spec=str(spec), hint="Use 'searched'.")
    if not bool(torch.isfinite(weight).all()):
        raise NonFinite("the weight holds NaN or infinity", spec=str(spec), shapes=str(tuple(weight.shape)))
    blocks = per_block(weight.detach().float(), spec.scale_shape(tuple(weight.shape)))
    unit = blocks.std(-1, keepdim=True, correction=0).clamp_min(1e-12)
    blocks = blocks / unit
    begin = rule(Values(blocks), spec)
    scale = begin.scale.unsqueeze(-1)
    zero = torch.zeros_like(scale) if begin.zero is None else begin.zero.unsqueeze(-1)
    best_scale, best_zero = scale, zero
    best = torch.full_like(scale, torch.inf)
    for _ in range(steps + 1):
        q = torch.clamp(torch.round(blocks / scale + zero), grid.qmin, grid.qmax) - zero
        apart = blocks - q * scale
        error = (apart.abs() ** power).sum(-1, keepdim=True)
        better = error < best
        best = torch.where(better, error, best)
        best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)
        size = apart.abs().clamp_min(1e-12)
        kept = torch.sign(apart) * (size - size ** (power - 1.0) / beta).clamp_min(0.0)
        target = blocks - kept
        if spec.zero != "float":
            norm = (q * q).sum(-1, keepdim=True)
            scale = torch.where(norm > 0, (target * q).sum(-1, keepdim=True) / norm.clamp_min(1e-12), scale)
            scale = torch.where(scale.abs() < 1e-12, best_scale, scale)
        else:
            zero = (q + zero - target / scale).mean(-1, keepdim=True)
        beta *= growth
    params = QParams((best_scale * unit).squeeze(-1), None if begin.zero is None else best_zero.squeeze(-1))
    return quantize(weight, spec, params)

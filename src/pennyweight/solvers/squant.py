"""SQuant: round so that the errors of every kernel and of every channel cancel."""

from __future__ import annotations

import torch
from torch import Tensor

from pennyweight.errors import SolverError, SpecError
from pennyweight.formats import grids
from pennyweight.formats.integer import Integer
from pennyweight.qtensor import QTensor, per_element
from pennyweight.ranges import RangeRule
from pennyweight.solvers import solvers
from pennyweight.solvers.rtn import rtn
from pennyweight.spec import QuantSpec


@solvers.register("squant")
def squant(weight: Tensor, spec: QuantSpec, rule: RangeRule, *, taps: int = 1) -> QTensor:
    """Start from nearest codes q with errors `e = q - w / s - z`; then, where S is the sum of a group's errors, move
    `rint(|S|)` of its codes by one against the sign of S, those of the largest errors of that sign:

        first in every kernel (`taps` columns), then, one code a kernel, in every row

    after which `|sum e| <= 1/2` holds for every row, and `<= 1` for every kernel. No data, no gradient: for inputs that
    share a mean, as behind a ReLU, the mean of the output stays. Codes at the end of the grid are not moved beyond it.

    Shapes: weight [out, in]; codes [out, in].
    Cost: sorting every kernel, and every row's kernels.
    Source: Guo et al. 2022, "SQuant" (arXiv:2202.07471), algorithms 1 to 4.

    Args:
        weight: [out, in].
        spec: of the codes.
        rule: finds the scales.
        taps: columns that belong to one input channel.

    Raises:
        SpecError: for grids whose levels are no consecutive integers.
        SolverError: if `taps` does not divide the columns.
    """
    grid = grids[spec.grid]
    if not isinstance(grid, Integer):
        raise SpecError("codes are moved by one, which needs consecutive integers", spec=str(spec))
    if weight.shape[1] % taps:
        raise SolverError(f"kernels of {taps} do not divide the columns", shapes=str(tuple(weight.shape)))
    q = rtn(weight, spec, rule)
    scale = q.scales()
    scale = per_element(torch.where(scale == 0, torch.ones_like(scale), scale), tuple(weight.shape))
    place = weight.detach().float() / scale
    if q.zero is not None:
        place = place + per_element(q.zero.float(), tuple(weight.shape))
    shape = (weight.shape[0], -1, taps)
    codes = q.codes.float().reshape(shape)  # [out, channels, taps]
    error = (codes - place.reshape(shape)).clamp(-0.5, 0.5)  # what was cut off stays cut off
    if taps > 1:
        total = error.sum(-1, keepdim=True)
        gain = _gain(error, total, codes, grid)
        order = gain.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        moved = (order < torch.round(total.abs())) & (gain > 0)
        codes, error = _move(codes, error, moved, total)
    kernels = error.sum(-1)  # [out, channels]
    total = kernels.sum(-1, keepdim=True)
    gain = _gain(error, total.unsqueeze(-1), codes, grid)
    best, where = gain.max(-1)  # the code of each kernel that may move, [out, channels]
    rank = torch.where(best > 0, kernels * total.sign(), torch.full_like(kernels, -torch.inf))
    order = rank.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    chosen = (order < torch.round(total.abs())) & (best > 0)
    moved = torch.zeros_like(error, dtype=torch.bool).scatter(-1, where.unsqueeze(-1), chosen.unsqueeze(-1))
    codes, _ = _move(codes, error, moved, total.unsqueeze(-1))
    return QTensor(codes.reshape(weight.shape).to(q.codes.dtype), q.scale, q.zero, spec)


def _gain(error: Tensor, total: Tensor, codes: Tensor, grid: Integer) -> Tensor:
    """Errors of the sum's sign by size; nothing for codes that would leave the grid."""
    sign = total.sign()
    target = codes - sign
    free = (target >= grid.qmin) & (target <= grid.qmax)
    return torch.where(free, error * sign, torch.zeros_like(error))


def _move(codes: Tensor, error: Tensor, moved: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    step = moved * total.sign()
    return codes - step, error - step

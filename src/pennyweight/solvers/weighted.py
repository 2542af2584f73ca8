"""Ranges that heed the inputs: searched where each weight counts as much as its input does, or with whole groups."""

from __future__ import annotations

import torch
from torch import Tensor

from pennyweight.errors import SpecError
from pennyweight.formats import grids
from pennyweight.qtensor import QParams, QTensor, per_block, quantize
from pennyweight.ranges import RangeRule
from pennyweight.ranges.mse import range_error, select_params
from pennyweight.solvers import input_solvers
from pennyweight.solvers.gptq import checked_gram
from pennyweight.spec import QuantSpec
from pennyweight.stats.values import Values

ROWS_AT_ONCE = 4096


@input_solvers.register("weighted")
def weighted(
    weight: Tensor, spec: QuantSpec, rule: RangeRule, gram: Tensor, *, steps: int = 60, shrink: float = 0.5
) -> QTensor:
    """Round to nearest under the scales of least `sum_i h_i (w_i - w'_i)^2` per block, `h = diag gram`.

    Candidates are the parameters of `rule` times f in [shrink, 1.1]; without a zero point each is followed by the least
    squares of its codes, `s = sum h w q / sum h q^2`.

    Shapes: weight [out, in]; gram [in, in]; blocks of one row.
    Source: `make_qx_quants` of ggml, with its importance matrix.

    Raises:
        NonFinite, SolverError: on weights or moments that are not finite, or do not fit.
        SpecError: if the spec does not fit the shape.
    """
    h = checked_gram(weight, spec, gram)[0].diagonal().float()
    values = Values.of(weight, spec)
    shape = tuple(values.blocks.shape[:-1])
    counts = per_block(h.expand_as(weight).contiguous(), shape)
    counts = counts + counts.mean(-1, keepdim=True) * 1e-3 + 1e-12  # dead inputs may wake up
    grid = grids[spec.grid]
    best = rule(values, spec)
    error = range_error(values.blocks, counts, best, spec, 2)
    start = best
    for i in range(steps):
        factor = shrink + (1.1 - shrink) * i / (steps - 1)
        trial = QParams(start.scale * factor, start.zero)
        if spec.zero == "none" and grid.affine:
            levels = grid.decode(grid.encode(values.blocks / trial.scale.unsqueeze(-1)))
            norm = (counts * levels * levels).sum(-1)
            least = (counts * values.blocks * levels).sum(-1) / norm.clamp_min(1e-30)
            trial = QParams(torch.where((norm > 0) & (least != 0), least, trial.scale), None)
        found = range_error(values.blocks, counts, trial, spec, 2)
        win = found < error
        best, error = select_params(win, trial, best), torch.where(win, found, error)
    return quantize(weight, spec, best)


@input_solvers.register("clip")
def clip(
    weight: Tensor, spec: QuantSpec, rule: RangeRule, gram: Tensor, *, steps: int = 20, shrink: float = 0.5
) -> QTensor:
    """Round to nearest under the scales of least output error of each group alone, `d^T H_gg d`, `d = w - w'`.

    Candidates are the parameters of `rule` times f in [shrink, 1].

    Shapes: weight [out, in]; gram [in, in]; blocks are groups of one row, or whole rows.
    Source: the clip search of AWQ, Lin et al. 2023 (arXiv:2306.00978), section 3.2 and mit-han-lab/llm-awq, whose
    sampled inputs the second moments stand for.

    Raises:
        NonFinite, SolverError: on weights or moments that are not finite, or do not fit.
        SpecError: if the spec does not fit the shape, or its blocks are not groups of one row.
    """
    h = checked_gram(weight, spec, gram)[0].float()
    rows, groups = spec.scale_shape(tuple(weight.shape))
    if rows != len(weight):
        raise SpecError(
            "clipping is searched for groups of one row", spec=str(spec), hint="int4[32], or int8n[1,*]."
        )
    size = weight.shape[1] // groups
    parts = torch.stack([h[g * size : (g + 1) * size, g * size : (g + 1) * size] for g in range(groups)])
    blocks = weight.detach().float().reshape(rows, groups, size)
    start = rule(Values.of(weight, spec), spec)
    best, error = start, torch.full((rows, groups), torch.inf)
    for i in range(steps):
        trial = QParams(start.scale * (1.0 - (1.0 - shrink) * i / steps), start.zero)
        apart = blocks - quantize(weight, spec, trial).dequantize().reshape(blocks.shape)
        found = torch.cat([
            torch.einsum("rgi,gij,rgj->rg", d, parts, d) for d in apart.split(max(1, ROWS_AT_ONCE * 64 // size))
        ])  # fmt: skip
        win = found < error
        best, error = select_params(win, trial, best), torch.where(win, found, error)
    return quantize(weight, spec, best)

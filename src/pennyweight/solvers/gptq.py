"""GPTQ: round column by column, and let the columns still to come make good for the error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from pennyweight.errors import NonFinite, SolverError
from pennyweight.formats import grids
from pennyweight.qtensor import QParams, QTensor, encode, per_element, quantize
from pennyweight.ranges import RangeRule
from pennyweight.solvers import input_solvers
from pennyweight.spec import QuantSpec
from pennyweight.stats.values import Values

ActOrder = Literal[True, False, "groups"]
DAMPINGS = 6  # how often the damping is raised tenfold before giving up
WIDE = 4096  # inputs beyond which factors are float32: there they are what needs most memory


@input_solvers.register("gptq")
def gptq(
    weight: Tensor,
    spec: QuantSpec,
    rule: RangeRule,
    gram: Tensor,
    *,
    damp: float = 0.01,
    act_order: ActOrder = True,
    block: int = 128,
) -> QTensor:
    """Minimise `tr((W - W') H (W - W')^T)` greedily, with `H = gram + damp * mean(diag gram) * I`.

        U = cholesky(H^-1), upper;  for every column i:  e = (w_i - Q(w_i)) / U_ii,  W[:, i:] -= e U[i, i:]

    With `act_order` columns of large `H_ii` come first, under scales that are fixed from the weights as given, so that
    groups stay where they are. Without it the scales of a group of columns are found when its turn comes, on the
    weights as updated so far. With "groups" both: the groups come in the order of their largest `H_ii`, the columns of
    each in the order of theirs, and a group's scales are found when its turn comes. Columns that never see an input
    (`gram_ii = 0`) become zero. Where the Cholesky factor does not exist, damping is raised tenfold.

    Shapes: weight [out, in]; gram [in, in], or [groups, in, in] for rows in that many parts.
    Cost: in^3 for the factor, out * in^2 for the updates.
    Source: Frantar et al. 2022, "GPTQ" (arXiv:2210.17323), algorithm 1; order and fixed groups: IST-DASLab/gptq;
    order of groups: ModelCloud/GPTQModel.

    Args:
        weight: [out, in].
        spec: of the codes.
        rule: finds the scales.
        gram: see above.
        damp: share of the mean of the diagonal that is added to it.
        act_order: see above.
        block: columns between two updates of all later columns; made a multiple of the group.

    Raises:
        NonFinite: if the weight or the gram matrix holds NaN or infinity.
        SolverError: if no damping makes the gram matrix positive definite, or shapes do not fit.
        SpecError: if the spec does not fit the shape.
    """
    h = checked_gram(weight, spec, gram)
    groups, columns = h.shape[0], h.shape[-1]
    work = weight.detach().float().reshape(groups, -1, columns).clone()
    dead = h.diagonal(dim1=-2, dim2=-1) == 0  # [groups, in]
    work.masked_fill_(dead.unsqueeze(1), 0.0)
    width = spec.block[-1] if spec.block and spec.block[-1] is not None else columns
    late = act_order is not True and width < columns  # scales of groups from the updated weights
    lead = torch.arange(columns // width).expand(groups, -1)  # order of the groups
    order = torch.arange(columns).expand(groups, -1)
    params = None if late else rule(Values.of(weight.float(), spec), spec)
    if act_order:
        most = h.diagonal(dim1=-2, dim2=-1) + dead.to(h.dtype)
        order = torch.argsort(most, dim=-1, descending=True, stable=True)
        if late:
            lead, order = _by_groups(most, width)
        work = _columns(work, order)

    # not kept beside its factors: where inputs are many these are what needs most memory
    def ordered() -> Tensor:
        fresh = _columns(_columns(h, order).mT, order).mT if act_order else h.clone()
        fresh.diagonal(dim1=-2, dim2=-1).add_(dead.gather(-1, order).to(h.dtype))
        return fresh

    upper = _factor(ordered, damp, spec)
    grid = grids[spec.grid]
    scale, zero = _spread(weight, spec, params, order, groups)
    codes = torch.empty_like(work)
    found: list[QParams] = []
    block = max(block // width, 1) * width if late else block
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        part, errors = work[:, :, start:stop].clone(), torch.empty_like(work[:, :, start:stop])
        for i in range(start, stop):
            j = i - start
            if late and i % width == 0:
                fresh = part[:, :, j : j + width].reshape(weight.shape[0], width)
                found.append(rule(Values.of(fresh, spec), spec))
                own = _spread(fresh, spec, found[-1], torch.arange(width).expand(groups, -1), groups)
                scale[:, :, i : i + width] = own[0]
                zero[:, :, i : i + width] = own[1]
            column, s, z = part[:, :, j], scale[:, :, i], zero[:, :, i]
            code = encode(column * (1.0 / s), z, spec)
            codes[:, :, i] = code.float()
            u = upper[:, i, i:stop].unsqueeze(1)  # [groups, 1, stop - i]
            error = (column - (grid.decode(code) - z) * s) / u[:, :, 0]
            part[:, :, j:] -= error.unsqueeze(-1) * u
            errors[:, :, j] = error
        work[:, :, stop:] -= errors @ upper[:, start:stop, stop:]
    if act_order:
        codes = _columns(codes, torch.argsort(order, dim=-1))
    if late:
        scales = _turned([p.scale for p in found], lead)
        params = QParams(scales, None if found[0].zero is None else _turned([p.zero for p in found], lead))
    assert params is not None
    stored = quantize(weight, spec, params)
    return QTensor(codes.reshape(weight.shape).to(stored.codes.dtype), stored.scale, stored.zero, spec)


def checked_gram(weight: Tensor, spec: QuantSpec, gram: Tensor) -> Tensor:
    """The gram matrix as float64, or float32 where it is wide, [groups, in, in].

    Raises:
        NonFinite, SolverError: see `gptq`.
    """
    h = gram.detach().to(torch.float32 if gram.shape[-1] > WIDE else torch.float64)
    h = h.unsqueeze(0) if h.ndim == 2 else h
    shapes = f"weight {tuple(weight.shape)}, gram {tuple(gram.shape)}"
    if h.ndim != 3 or h.shape[1:] != (weight.shape[1],) * 2 or weight.shape[0] % h.shape[0]:
        raise SolverError(
            "the gram matrix does not fit the weight", shapes=shapes, hint="[in, in] or [groups, in, in]."
        )
    for name, x in (("weight", weight), ("gram matrix", h)):
        if not bool(torch.isfinite(x).all()):
            raise NonFinite(f"the {name} holds NaN or infinity", spec=str(spec), shapes=shapes)
    return h


def _by_groups(most: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The order of groups of columns [groups, in / width], and that of all columns [groups, in]."""
    apart = most.unflatten(-1, (-1, width))
    lead = torch.argsort(apart.amax(-1), dim=-1, descending=True, stable=True)
    inner = torch.argsort(apart, dim=-1, descending=True, stable=True)
    inner = inner + width * torch.arange(inner.shape[1]).unsqueeze(-1)
    return lead, inner.gather(1, lead.unsqueeze(-1).expand_as(inner)).flatten(1)


def _turned(params: list[Tensor | None], lead: Tensor) -> Tensor:
    """Numbers of groups of columns, [rows, 1] each, that came in the order `lead`, as [rows, in / width]."""
    found = torch.cat([p for p in params if p is not None], -1)
    apart = found.reshape(len(lead), -1, found.shape[-1])
    return _columns(apart, torch.argsort(lead, dim=-1)).reshape(found.shape)


def _columns(x: Tensor, order: Tensor) -> Tensor:
    """Columns in another order: x [groups, rows, in], order [groups, in]."""
    return x.gather(-1, order.unsqueeze(1).expand_as(x))


def _factor(make: Callable[[], Tensor], damp: float, spec: QuantSpec) -> Tensor:
    """Upper Cholesky factor of the inverse, float32 [groups, in, in], of a matrix that is made anew for every try."""
    tried: list[float] = []
    for _ in range(DAMPINGS):
        tried.append(damp)
        h = make()
        shape = tuple(h.shape)
        # a factor changes nothing but what overflows
        h /= h.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
        for last, more in zip([0.0, *tried], tried, strict=False):
            h.diagonal(dim1=-2, dim2=-1).add_(more - last)
        lower, failed = torch.linalg.cholesky_ex(h)
        del h
        if not bool(failed.any()):
            inverse = torch.cholesky_inverse(lower)
            del lower
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            del inverse
            if not bool(failed.any()) and bool(torch.isfinite(torch.stack(torch.aminmax(upper))).all()):
                found: Tensor = upper.float()
                return found
            del upper
        damp = max(10 * damp, 1e-6)
    raise SolverError(
        f"the gram matrix is not positive definite, not even with {damp / 10:g} of its mean diagonal added",
        spec=str(spec),
        shapes=str(shape),
        hint="Calibrate with more inputs, or use the solver 'rtn'.",
    )


def _spread(
    weight: Tensor, spec: QuantSpec, params: QParams | None, order: Tensor, groups: int
) -> tuple[Tensor, Tensor]:
    """Scale and zero point of every element as stored, [groups, rows, in], columns in the given order; else 1 and 0."""
    shape = (groups, weight.shape[0] // groups, weight.shape[1])
    if params is None:
        return torch.ones(shape), torch.zeros(shape)
    stored = quantize(weight, spec, params)
    scale = stored.scales()
    safe = torch.where(scale == 0, torch.ones_like(scale), scale)
    zero = torch.zeros_like(scale) if stored.zero is None else stored.zero.float()
    wide = [_columns(per_element(p, tuple(weight.shape)).reshape(shape), order) for p in (safe, zero)]
    return wide[0], wide[1]

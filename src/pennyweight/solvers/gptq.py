"""GPTQ: round column by column, and let the columns still to come make good for the error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from pennyweight.errors import NonFinite, SolverError
from pennyweight.formats import grids
from pennyweight.qtensor import QParams, QTensor, encode, quantize
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
        fresh = _square(h, order if act_order else None)
        fresh.diagonal(dim1=-2, dim2=-1).add_(dead.gather(-1, order).to(h.dtype))
        return fresh

    upper = _factor(ordered, damp, spec)
    grid = grids[spec.grid]
    numbers = None if params is None else _Numbers(weight, spec, params, groups)
    codes = torch.empty_like(work, dtype=torch.int16 if grid.bits <= 8 else torch.float32)
    found: list[QParams] = []
    block = max(block // width, 1) * width if late else block
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        part, errors = work[:, :, start:stop].clone(), torch.empty_like(work[:, :, start:stop])
        scale, zero = torch.empty_like(part), torch.empty_like(part)
        if numbers is not None:
            scale, zero = numbers.of(order[:, start:stop])
        for i in range(start, stop):
            j = i - start
            if late and i % width == 0:
                fresh = part[:, :, j : j + width].reshape(weight.shape[0], width)
                found.append(rule(Values.of(fresh, spec), spec))
                own = _Numbers(fresh, spec, found[-1], groups).of(torch.arange(width).expand(groups, -1))
                scale[:, :, j : j + width], zero[:, :, j : j + width] = own
            column, s, z = part[:, :, j], scale[:, :, j], zero[:, :, j]
            code = encode(column * (1.0 / s), z, spec)
            codes[:, :, i] = code.to(codes.dtype)
            u = upper[:, i, i:stop].unsqueeze(1)  # [groups, 1, stop - i]
            error = (column - (grid.decode(code) - z) * s) / u[:, :, 0]
            part[:, :, j:] -= error.unsqueeze(-1) * u
            errors[:, :, j] = error
        work[:, :, stop:] -= errors @ upper[:, start:stop, stop:]
    del work, upper  # neither beside what is still to be made
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
    """Columns in another order, or some of them: x [groups, rows, in], order [groups, columns]."""
    return x.gather(-1, order.unsqueeze(1).expand(-1, x.shape[1], -1))


def _factor(make: Callable[[], Tensor], damp: float, spec: QuantSpec) -> Tensor:
    """Upper Cholesky factor of the inverse, float32 [groups, in, in], of a matrix that is made anew for every try.

    The matrix, column by column in memory as LAPACK has it, becomes its factor, its inverse and that one's factor in
    place: where inputs are many, two such matrices are what needs most memory.
    """
    tried: list[float] = []
    for _ in range(DAMPINGS):
        tried.append(damp)
        h = make()
        shape = tuple(h.shape)
        # a factor changes nothing but what overflows
        h /= h.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
        for last, more in zip([0.0, *tried], tried, strict=False):
            h.diagonal(dim1=-2, dim2=-1).add_(more - last)
        failed = torch.zeros(len(h), dtype=torch.int32)
        torch.linalg.cholesky_ex(h, out=(h, failed))
        if not bool(failed.any()):
            torch.cholesky_inverse(h, out=h)
            torch.linalg.cholesky_ex(h, upper=True, out=(h, failed))
            if not bool(failed.any()) and bool(torch.isfinite(torch.stack(torch.aminmax(h))).all()):
                found: Tensor = h.float()
                return found
        del h
        damp = max(10 * damp, 1e-6)
    raise SolverError(
        f"the gram matrix is not positive definite, not even with {damp / 10:g} of its mean diagonal added",
        spec=str(spec),
        shapes=str(shape),
        hint="Calibrate with more inputs, or use the solver 'rtn'.",
    )


def _square(h: Tensor, order: Tensor | None) -> Tensor:
    """A copy of [groups, in, in], column by column in memory; rows and columns in another order, if one is given."""
    out = torch.empty_like(h, memory_format=torch.contiguous_format)
    for i, (matrix, to) in enumerate(zip(h.mT, out, strict=True)):
        lead = torch.arange(h.shape[-1]) if order is None else order[i]
        for rows, part in zip(lead.split(256), to.split(256), strict=True):
            part.copy_(matrix[rows][:, lead])
    return out.mT


class _Numbers:
    """Scales and zero points as stored, of columns in any order: 1 for a scale of 0, 0 where there is no zero point."""

    def __init__(self, weight: Tensor, spec: QuantSpec, params: QParams, groups: int) -> None:
        stored = quantize(weight, spec, params)
        scale = stored.scales()
        safe = torch.where(scale == 0, torch.ones_like(scale), scale)
        zero = torch.zeros_like(scale) if stored.zero is None else stored.zero.float()
        self._width = weight.shape[1] // scale.shape[1]
        rows = weight.shape[0] // scale.shape[0]
        self._scale, self._zero = (
            p.repeat_interleave(rows, 0).reshape(groups, -1, scale.shape[1]) for p in (safe, zero)
        )

    def of(self, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point of every element, [groups, rows, columns], for columns [groups, columns]."""
        place = columns // self._width
        return _columns(self._scale, place), _columns(self._zero, place)

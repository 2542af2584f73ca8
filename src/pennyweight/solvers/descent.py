"""Coordinate descent: GPTQ under several scales, then codes one by one and scales in turn, each to its best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from pennyweight.errors import SolverError
from pennyweight.formats import grids
from pennyweight.qtensor import QParams, QTensor, encode, per_element, quantize
from pennyweight.ranges import RangeRule
from pennyweight.solvers import input_solvers
from pennyweight.solvers.gptq import checked_gram, gptq
from pennyweight.spec import QuantSpec
from pennyweight.stats import Statistic
from pennyweight.stats.values import Values

FRACTIONS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 1.05, 1.1)
# formats of scales that hold what a least-squares fit gives
REFITTED = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
BLOCK = 128  # columns between two updates of all columns
TOGETHER = 1 << 24  # weights, times fractions, that GPTQ is given at once: each is some tens of bytes there


@input_solvers.register("descent")
def descent(
    weight: Tensor,
    spec: QuantSpec,
    rule: RangeRule,
    gram: Tensor,
    *,
    damp: float = 0.01,
    fractions: Sequence[float] = FRACTIONS,
    rounds: int = 3,
    sweeps: int = 6,
) -> QTensor:
    """Minimise `tr((W - W') H (W - W')^T)` over codes and scales, with `H = gram + damp * mean(diag gram) * I`.

    GPTQ finds codes under the rule's scales times each of `fractions`; rows that share scales keep the best. From
    there, with `G = (W' - W) H`,

        every code in turn:   q_i = Q(w'_i - G_i / H_ii)
        every scale in turn:  s_b = s_b - sum_b(l G) / sum_b(l H_bb l),   l = q - z of the elements of its block

    until no code changes; no step raises the error. Zero points stay those of the rule. Scales that are stored as
    powers of two or as codes themselves are not refitted.

    Shapes: weight [out, in]; gram [in, in], or [groups, in, in] for rows in that many parts.
    Cost: that of GPTQ with `len(fractions)` times as many rows, and out * in^2 a sweep.
    Source: Behdin et al. 2023, "QuantEase" (arXiv:2309.01885), algorithm 1; scales: Zhang et al. 2024, "COMQ"
    (arXiv:2403.07134), section 3.

    Args:
        weight: [out, in].
        spec: of the codes.
        rule: finds the scales to start from.
        gram: see above.
        damp: share of the mean of the diagonal that is added to it.
        fractions: of the rule's scales that are tried; the first is kept where others are no better.
        rounds: how often scales are refitted, after codes.
        sweeps: over the codes a round, at most.

    Raises:
        NonFinite: if the weight or the gram matrix holds NaN or infinity.
        SolverError: see `gptq`; if there are no fractions, or one is not positive.
        SpecError: if the spec does not fit the shape.
    """
    if not fractions or min(fractions) <= 0:
        raise SolverError(f"fractions of scales {tuple(fractions)}", hint="At least one, all positive.")
    h = checked_gram(weight, spec, gram).float()
    h = h + torch.diag_embed(damp * h.diagonal(dim1=-2, dim2=-1).mean(-1, True).expand(h.shape[:2]))
    dead = h.diagonal(dim1=-2, dim2=-1) == 0
    params = rule(Values.of(weight.float(), spec), spec)
    h.masked_fill_(torch.diag_embed(dead), 1.0)
    problem = _Problem(weight.detach().float(), spec, params.zero, h)
    state = problem.started(params, gram, fractions, damp)
    least, best = problem.cost(state), state.copy()
    for _ in range(rounds):
        problem.sweep(state, sweeps)
        if spec.scale in REFITTED:
            problem.refit(state, REFITTED[spec.scale])
        cost = problem.cost(state)
        if not cost < least:
            break
        least, best = cost, state.copy()
    stored = problem.stored(best.scale)
    return QTensor(best.codes.reshape(weight.shape), stored.scale, stored.zero, spec)


@dataclass(frozen=True)
class _Given:
    """A range rule that knows the answer."""

    params: QParams
    needs: ClassVar[str] = "values"

    def __call__(self, stat: Statistic, spec: QuantSpec) -> QParams:
        """The numbers given."""
        return self.params


@dataclass
class _State:
    """codes: [groups, rows, in]. scale: float32 [n, m], numbers that the spec can hold."""

    codes: Tensor
    scale: Tensor

    def copy(self) -> _State:
        return _State(self.codes.clone(), self.scale.clone())


class _Problem:
    """A weight, its grid and zero points, and the matrix that errors are measured by."""

    def __init__(self, weight: Tensor, spec: QuantSpec, zero: Tensor | None, h: Tensor) -> None:
        self.weight, self.spec, self.zero, self.h = weight, spec, zero, h
        self.grid = grids[spec.grid]
        self.rows = weight.reshape(h.shape[0], -1, h.shape[-1])  # [groups, rows, in]

    def started(self, params: QParams, gram: Tensor, fractions: Sequence[float], damp: float) -> _State:
        """GPTQ's codes under the best of the scales."""
        out, columns = self.weight.shape
        groups = len(self.h)
        scale = quantize(self.weight, self.spec, params).scales()
        width = columns // scale.shape[1]
        own = replace(self.spec, block=(1, None if width == columns else width), scale="fp32")

        def many(parts: Sequence[Tensor]) -> Tensor:
            """Of every row, once for each part: tensors [n, m] to [groups * parts * rows, m]."""
            by_row = [x.repeat_interleave(out // len(x), 0).reshape(groups, -1, x.shape[1]) for x in parts]
            return torch.stack(by_row, 1).flatten(0, 2)

        tried = [self.stored(scale * f).scales() for f in fractions]
        size = max(TOGETHER // self.weight.numel(), 1)
        picked, best = torch.zeros_like(self.rows, dtype=self.grid.dtype), scale
        least = torch.full((len(scale),), torch.inf, device=scale.device)
        for start in range(0, len(tried), size):
            part = tried[start : start + size]
            count = len(part)
            given = QParams(many(part), None if self.zero is None else many([self.zero] * count))
            q = gptq(many([self.weight] * count), own, _Given(given), gram, damp=damp)  # type: ignore[call-arg]
            error = q.dequantize().reshape(groups, count, -1, columns) - self.rows.unsqueeze(1)
            cost = ((error @ self.h.unsqueeze(1)) * error).sum(-1)  # [groups, count, rows]
            shared = cost.movedim(1, -1).reshape(len(scale), -1, count).sum(1)  # of rows with the same scales
            for codes, scales, found in zip(
                q.codes.reshape(groups, count, -1, columns).unbind(1), part, shared.unbind(1), strict=True
            ):
                better = found < least
                rows = better.repeat_interleave(out // len(scale)).reshape(groups, -1, 1)
                picked, least = torch.where(rows, codes, picked), torch.where(better, found, least)
                best = torch.where(better.unsqueeze(1), scales, best)
        return _State(picked, self.stored(best).scales())

    def stored(self, scale: Tensor) -> QTensor:
        """Scales and zero points as the spec holds them; the codes are those of rounding to nearest."""
        return quantize(self.weight, self.spec, QParams(scale, self.zero))

    def _each(self, numbers: Tensor) -> Tensor:
        """Numbers [n, m] of every element, [groups, rows, in]."""
        return per_element(numbers, tuple(self.weight.shape)).reshape(self.rows.shape)

    def _levels(self, state: _State) -> Tensor:
        levels = self.grid.decode(state.codes)
        return levels if self.zero is None else levels - self._each(self.zero.float())

    def _slope(self, state: _State) -> Tensor:
        return (self._levels(state) * self._each(state.scale) - self.rows) @ self.h

    def cost(self, state: _State) -> float:
        """The error."""
        error = self._levels(state) * self._each(state.scale) - self.rows
        return float(((error @ self.h) * error).sum(dtype=torch.float64))

    def sweep(self, state: _State, most: int) -> None:
        """Codes in turn, until none changes."""
        scale = self._each(state.scale)
        scale = torch.where(scale == 0, torch.ones_like(scale), scale)
        zero = torch.zeros_like(scale) if self.zero is None else self._each(self.zero.float())
        slope, diagonal = self._slope(state), self.h.diagonal(dim1=-2, dim2=-1)
        value = self._levels(state) * scale
        for _ in range(most):
            changed = False
            for start in range(0, self.h.shape[-1], BLOCK):
                own = slice(start, start + BLOCK)
                part, moved = slope[..., own].clone(), torch.zeros_like(slope[..., own])
                for j in range(part.shape[-1]):
                    i = start + j
                    s, z = scale[..., i], zero[..., i]
                    wanted = value[..., i] - part[..., j] / diagonal[:, None, i]
                    code = encode(wanted * (1.0 / s), z, self.spec)
                    new = (self.grid.decode(code) - z) * s
                    moved[..., j] = new - value[..., i]
                    part += moved[..., j : j + 1] * self.h[:, i : i + 1, own]
                    state.codes[..., i], value[..., i] = code, new
                if bool(moved.any()):
                    changed = True
                    slope += moved @ self.h[:, own]
            if not changed:
                return

    def refit(self, state: _State, dtype: torch.dtype) -> None:
        """Scales in turn, each to the least squares given the others; one whose sign would turn is left."""
        levels, slope = self._levels(state), self._slope(state)
        blocks, width = state.scale.shape[1], self.h.shape[-1] // state.scale.shape[1]
        for b in range(blocks):
            own = slice(b * width, (b + 1) * width)
            part = levels[..., own]
            towards = part @ self.h[:, own]  # [groups, rows, in]
            gain, curve = (part * slope[..., own]).sum(-1), (part * towards[..., own]).sum(-1)
            shared = [x.reshape(len(state.scale), -1).sum(1) for x in (gain, curve)]
            before = state.scale[:, b].clone()
            fitted = before - shared[0] / shared[1].clamp_min(1e-30)
            state.scale[:, b] = torch.where(fitted * before > 0, fitted, before).to(dtype).float()
            step = (state.scale[:, b] - before).repeat_interleave(self.weight.shape[0] // len(before))
            slope += step.reshape(*self.rows.shape[:2], 1) * towards

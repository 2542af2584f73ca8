"""The range whose rounding and clipping error together are least."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor

from pennyweight.formats import grids
from pennyweight.qtensor import QParams, encode
from pennyweight.ranges import params_of_range, ranges
from pennyweight.ranges.signed import Signed
from pennyweight.spec import QuantSpec
from pennyweight.stats import Distribution, Statistic

AT_ONCE = 1 << 16  # values of a trial: what is made of them stays in the cache


def range_error(values: Tensor, weights: Tensor, params: QParams, spec: QuantSpec, power: float) -> Tensor:
    """`sum_i w_i |Q(v_i) - v_i|^power` per block. Shapes: values, weights [*blocks, n]; result [*blocks]."""
    rows = max(1, AT_ONCE * len(values) // max(values.numel(), 1)) if values.ndim > 1 else 0
    if rows >= len(values) or not rows:
        return _error(values, weights, params, spec, power)
    parts = [values.split(rows), weights.expand_as(values).split(rows), params.scale.split(rows)]
    zeros = [None] * len(parts[0]) if params.zero is None else params.zero.split(rows)
    return torch.cat(
        [_error(v, w, QParams(s, z), spec, power) for v, w, s, z in zip(*parts, zeros, strict=True)]
    )


def _error(values: Tensor, weights: Tensor, params: QParams, spec: QuantSpec, power: float) -> Tensor:
    scale = params.scale.unsqueeze(-1)
    zero = None if params.zero is None else params.zero.unsqueeze(-1)
    grid = grids[spec.grid]
    decoded = grid.decode(encode(values * (1.0 / scale), zero, spec))
    if zero is not None:
        decoded = decoded - zero
    error = decoded * scale - values
    error = error * error if power == 2 else error.abs() ** power
    return (error * weights).sum(-1)


@ranges.register("mse")
@dataclass(frozen=True)
class MSE:
    """Grid search over shrunken ranges: `argmin_f sum_i w_i |Q_f(x_i) - x_i|^p` with `[lo, hi]` times f.

    Both ends shrink together; with a zero point each end is then refined alone. Never worse than min-max in its own
    objective, because f = 1 is a candidate. A symmetric full-range grid also tries signed scales.

    Args:
        steps: candidates for f, evenly spaced in [shrink, 1].
        shrink: smallest f.
        power: p; 2 is the mean squared error, 2.4 is GPTQ's choice for weights.
    Source: Nagel et al. 2021 (arXiv:2106.08295), equation 16; p = 2.4: Frantar et al. 2022 (IST-DASLab/gptq).
    """

    steps: int = 100
    shrink: float = 0.2
    power: float = 2.0
    needs: ClassVar[str] = "histogram"

    def __call__(self, stat: Statistic, spec: QuantSpec) -> QParams:
        """Parameters of the best range. Raises NonFinite on bounds that are not numbers."""
        lo, hi = stat.lo, stat.hi
        best = params_of_range(lo, hi, spec)
        values, weights = cast("Distribution", stat).support()
        if values.numel() == 0:
            return best
        best_error = range_error(values, weights, best, spec, self.power)
        grid = grids[spec.grid]
        if grid.affine and spec.zero == "none" and float(grid.levels()[0]) == -float(grid.levels()[-1]) - 1:
            signed = Signed()(stat, spec).scale
            for f in self._factors():
                best, best_error = _better(
                    best, best_error, QParams(signed * f), values, weights, spec, self.power
                )
        f_lo, f_hi = torch.ones_like(lo), torch.ones_like(hi)
        for move_lo, move_hi in ((True, True), (True, False), (False, True)):
            if spec.zero == "none" and not (move_lo and move_hi):
                continue
            start_lo, start_hi = f_lo.clone(), f_hi.clone()
            for f in self._factors():
                trial_lo = start_lo * f if move_lo else start_lo
                trial_hi = start_hi * f if move_hi else start_hi
                trial = params_of_range(lo * trial_lo, hi * trial_hi, spec)
                error = range_error(values, weights, trial, spec, self.power)
                win = error < best_error
                best = select_params(win, trial, best)
                best_error = torch.where(win, error, best_error)
                f_lo, f_hi = torch.where(win, trial_lo, f_lo), torch.where(win, trial_hi, f_hi)
        return best

    def _factors(self) -> list[float]:
        step = (1 - self.shrink) / max(self.steps - 1, 1)
        return [1 - i * step for i in range(self.steps)]


def select_params(win: Tensor, a: QParams, b: QParams) -> QParams:
    """Those of `a` where it wins, else of `b`, block by block."""
    zero = None
    if a.zero is not None and b.zero is not None:
        zero = torch.where(win, a.zero, b.zero)
    return QParams(torch.where(win, a.scale, b.scale), zero)


def _better(
    best: QParams,
    error: Tensor,
    trial: QParams,
    values: Tensor,
    weights: Tensor,
    spec: QuantSpec,
    power: float,
) -> tuple[QParams, Tensor]:
    trial_error = range_error(values, weights, trial, spec, power)
    win = trial_error < error
    return select_params(win, trial, best), torch.where(win, trial_error, error)

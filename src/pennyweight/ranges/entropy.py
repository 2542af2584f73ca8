"""The clip whose quantized histogram stays closest to the original in relative entropy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pennyweight.errors import SpecError
from pennyweight.formats import grids
from pennyweight.qtensor import QParams
from pennyweight.ranges import params_of_range, ranges
from pennyweight.spec import QuantSpec
from pennyweight.stats import Statistic
from pennyweight.stats.histogram import Histogram


def best_clip(counts: Tensor, levels: int, *, start: int = 128, stride: int = 1) -> int:
    """Index of the bin edge to clip at: `argmin_i KL(P_i || Q_i)`, the last one on ties.

    For each i: P is `counts[:i]` with the mass beyond added to its last bin; Q joins those i bins (without the
    outliers) into `levels` equal ones and spreads each level's mass evenly over its non-empty bins. Before that
    `counts[0] = counts[1]`, or the zeros that a ReLU makes would decide alone.

    Shapes: counts [n] of |x| from zero upwards; levels is `2^(bits - 1)` for signed, `2^bits` for unsigned data.
    Source: Migacz 2017, "8-bit inference with TensorRT" (GTC), with the details of the calibrator that NVIDIA ships
    (TensorRT-Model-Optimizer, `modelopt/torch/quantization/calib/histogram.py`).
    """
    bins = counts.double().clone()
    if len(bins) > 1:
        bins[0] = bins[1]
    tries = torch.arange(min(start, len(bins)), len(bins) + 1, stride)
    divergence = torch.cat([_divergences(bins, part, levels) for part in tries.split(512)])
    close = tries[divergence <= divergence.min() + 1e-9]  # differences of sums: settle ties term by term
    best, least = len(bins), float("inf")
    for i in close.tolist():
        exact = _divergence(bins, i, levels)
        if exact <= least:
            best, least = i, exact
    return best


def _cuts(tries: Tensor, levels: int) -> Tensor:
    """First source bin of each level: bin j is in level k if `i k / levels <= j < i (k + 1) / levels`.

    Shapes: tries [t] of i; result [t, levels + 1].
    """
    step = tries.double() / levels
    cuts = torch.ceil(torch.arange(levels + 1, dtype=torch.float64) * step.unsqueeze(1)).long()
    cuts[:, -1] = tries
    return torch.minimum(cuts, tries.unsqueeze(1))


def _divergences(bins: Tensor, tries: Tensor, levels: int) -> Tensor:
    """KL of every clip at once, by differences of running sums. Shapes: tries and result [t].

    `(sum p log p - sum p log q) / T - log(T / T_q)` with T and T_q the sums of p and q, both not normalised.
    """
    zero = bins.new_zeros(1)
    mass = torch.cat([zero, bins.cumsum(0)])
    own = torch.cat([zero, torch.xlogy(bins, bins).cumsum(0)])
    filled = torch.cat([zero, (bins > 0).double().cumsum(0)])
    cut = _cuts(tries, levels)
    level_mass = mass[cut[:, 1:]] - mass[cut[:, :-1]]
    level_filled = filled[cut[:, 1:]] - filled[cut[:, :-1]]
    even = torch.where(level_filled > 0, level_mass / level_filled.clamp(min=1), torch.ones_like(level_mass))
    total, inside = mass[-1], mass[tries]
    beyond = total - inside
    last = bins[tries - 1]
    last_level = torch.searchsorted(cut, (tries - 1).unsqueeze(1), right=True) - 1
    last_q = even.gather(1, last_level.clamp(max=levels - 1)).squeeze(1)
    p_log_p = own[tries] - torch.xlogy(last, last) + torch.xlogy(last + beyond, last + beyond)
    p_log_q = torch.xlogy(level_mass, even).sum(1) + torch.xlogy(beyond, last_q)
    found = (p_log_p - p_log_q) / total - torch.log(total / inside)
    impossible = (inside <= 0) | ((last == 0) & (beyond > 0))
    return torch.where(impossible, torch.full_like(found, torch.inf), found)


def _divergence(bins: Tensor, i: int, levels: int) -> float:
    """KL of the clip at edge i, bin by bin."""
    cut = _cuts(torch.tensor([i]), levels)[0]
    nonzero = bins[:i] > 0
    sizes = cut[1:] - cut[:-1]
    level = torch.repeat_interleave(torch.arange(levels), sizes)
    mass = bins.new_zeros(levels).index_add_(0, level, bins[:i])
    filled = bins.new_zeros(levels).index_add_(0, level, nonzero.double())
    q = (mass / filled.clamp(min=1))[level] * nonzero
    p = bins[:i].clone()
    p[-1] += bins[i:].sum()
    p_sum, q_sum = p.sum(), q.sum()
    if float(p_sum) == 0 or float(q_sum) == 0:
        return float("inf")
    p, q = p / p_sum, q / q_sum
    used = p > 0
    if bool((q[used] == 0).any()):
        return float("inf")
    return float((p[used] * torch.log(p[used] / q[used])).sum())


@ranges.register("entropy")
@dataclass(frozen=True)
class Entropy:
    """Clip |x| at the edge that `best_clip` finds; made for the activations of convolutional networks.

    Args:
        bins: bins of |x| to search over.
    """

    bins: int = 2048
    needs: ClassVar[str] = "histogram"

    def __call__(self, stat: Statistic, spec: QuantSpec) -> QParams:
        """Parameters of the clipped range.

        Raises:
            SpecError: if `stat` is not a histogram of a whole tensor.
            NonFinite: on bounds that are not numbers.
        """
        if not isinstance(stat, Histogram):
            raise SpecError("the entropy rule is for histograms of whole tensors", spec=str(spec))
        counts, edges = stat.magnitudes(self.bins)
        unsigned = int(float(stat.lo) >= 0)
        levels = 1 << (grids[spec.grid].bits - 1 + unsigned)
        amax = edges[min(best_clip(counts, levels), len(edges) - 1)].float()
        return params_of_range(torch.maximum(stat.lo, -amax), torch.minimum(stat.hi, amax), spec)

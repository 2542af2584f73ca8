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
    Source: Migacz 2017, "8-bit inference with TensorRT" (GTC); ALGORITHMS of NVIDIA's calibrator, as in its
    `calib/histogram.py`.
    """
    bins = counts.double().clone()
    if len(bins) > 1:
        bins[0] = bins[1]
    total = float(bins.sum())
    best, best_divergence = len(bins), float("inf")
    cumulative = torch.cat([bins.new_zeros(1), bins.cumsum(0)])
    nonzero = bins > 0
    filled = torch.cat([torch.zeros(1, dtype=torch.int64), nonzero.long().cumsum(0)])
    for i in range(min(start, len(bins)), len(bins) + 1, stride):
        # `digitize` of 0..i-1 on linspace(0, i, levels + 1): source bin j belongs to level floor(j * levels / i)
        cut = torch.ceil(torch.arange(levels + 1, dtype=torch.float64) * i / levels).long().clamp(max=i)
        mass = cumulative[cut[1:]] - cumulative[cut[:-1]]
        width = (filled[cut[1:]] - filled[cut[:-1]]).double()
        even = torch.where(width > 0, mass / width.clamp(min=1), torch.zeros_like(mass))
        q = torch.repeat_interleave(even, cut[1:] - cut[:-1]) * nonzero[:i]
        p = bins[:i].clone()
        p[-1] += total - float(cumulative[i])
        divergence = _relative_entropy(p, q)
        if divergence <= best_divergence:
            best, best_divergence = i, divergence
    return best


def _relative_entropy(p: Tensor, q: Tensor) -> float:
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

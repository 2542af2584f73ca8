"""A histogram that streams: the range grows, memory does not, and merging is exact in any order."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor

from pennyweight.errors import NonFinite
from pennyweight.stats import stats

BINS = 4096
_FINEST = -120  # width 2^-120: all-zero tensors end here
_REACH = (
    40  # bins are no finer than 2^-40 of the greatest magnitude: float32 has 24 bits, and indices stay small
)


def _span(lo: float, hi: float, exponent: int) -> int:
    return math.floor(math.ldexp(hi, -exponent)) - math.floor(math.ldexp(lo, -exponent)) + 1


@stats.register("histogram")
@dataclass
class Histogram:
    """Counts in bins `[i * w, (i + 1) * w)` of width `w = 2^exponent`, at most `BINS` of them in use.

    When a value falls outside, pairs of bins are joined until the range fits: edges nest, so the counts are those
    that one pass with the final width would have given, whatever the order of updates and merges.

    counts: int64 [BINS], bin `first + i` at index i. lo, hi: 0-d float32.
    """

    counts: Tensor = field(default_factory=lambda: torch.zeros(BINS, dtype=torch.int64))
    first: int = 0
    exponent: int = _FINEST
    lo: Tensor = field(default_factory=lambda: torch.tensor(float("inf")))
    hi: Tensor = field(default_factory=lambda: torch.tensor(float("-inf")))
    count: int = 0

    def update(self, x: Tensor) -> None:
        """Take in a tensor of any shape; an empty one changes nothing.

        Raises:
            NonFinite: on NaN or infinity, which have no bin.
        """
        if not x.numel():
            return
        flat = x.detach().float().reshape(-1)
        lo, hi = torch.aminmax(flat)
        if not bool(torch.isfinite(lo) & torch.isfinite(hi)):
            raise NonFinite("a histogram has no bins for NaN or infinity", shapes=str(tuple(x.shape)))
        self._grow(lo, hi, self.exponent)
        index = torch.floor(flat.double() * math.ldexp(1.0, -self.exponent)).long() - self.first
        self.counts = self.counts + torch.bincount(index, minlength=BINS)
        self.count += flat.numel()

    def merge(self, other: Self) -> None:
        """Take in everything that `other` has seen."""
        if other.count == 0:
            return
        mine = type(self).from_state(other.state())  # a copy: joining bins must not change `other`
        self._grow(other.lo, other.hi, other.exponent)
        mine._grow(self.lo, self.hi, self.exponent)
        self.counts = self.counts + mine.counts
        self.count += other.count

    def _grow(self, lo: Tensor, hi: Tensor, finest: int) -> None:
        """Widen to hold [lo, hi] with bins no finer than 2^finest."""
        new_lo, new_hi = torch.minimum(self.lo, lo), torch.maximum(self.hi, hi)
        low, high = float(new_lo), float(new_hi)
        exponent = max(self.exponent, finest, math.frexp(max(-low, high))[1] - _REACH)
        if _span(low, high, exponent) > BINS:
            guess = math.frexp((high - low) / BINS)[1] - 1
            exponent = max(exponent, guess - 1)
            while _span(low, high, exponent) > BINS:
                exponent += 1
        first = math.floor(math.ldexp(low, -exponent))
        if self.count and (exponent, first) != (self.exponent, self.first):
            used = torch.nonzero(self.counts).reshape(-1)
            index = ((used + self.first) >> (exponent - self.exponent)) - first
            counts = torch.zeros(BINS, dtype=torch.int64)
            self.counts = counts.index_add_(0, index, self.counts[used])
        self.first, self.exponent, self.lo, self.hi = first, exponent, new_lo, new_hi

    @property
    def width(self) -> float:
        """Width of a bin."""
        return math.ldexp(1.0, self.exponent)

    def support(self) -> tuple[Tensor, Tensor]:
        """Centres of the used bins, ascending, clipped to the seen range [n], and their counts [n]."""
        used = int(torch.nonzero(self.counts).max()) + 1 if self.count else 0
        centres = (torch.arange(used, dtype=torch.float64) + (self.first + 0.5)) * self.width
        values = centres.clamp(float(self.lo), float(self.hi)) if used else centres
        return values.float(), self.counts[:used].float()

    def magnitudes(self, bins: int = 2048) -> tuple[Tensor, Tensor]:
        """Histogram of |x|: counts int64 [n] and edges float64 [n + 1], about `bins` bins of one width from zero."""
        index = torch.arange(BINS) + self.first
        index = torch.where(index >= 0, index, -1 - index)
        seen = index[self.counts > 0]
        used = int(seen.max()) + 1 if len(seen) else 1
        join = max(1, used // bins)  # before anything is allocated: values far from zero have large indices
        counts = torch.zeros(-(-used // join), dtype=torch.int64)
        counts.index_add_(0, seen // join, self.counts[self.counts > 0])
        edges = torch.arange(len(counts) + 1, dtype=torch.float64) * (self.width * join)
        return counts, edges

    def state(self) -> dict[str, Tensor]:
        """Plain tensors."""
        numbers = torch.tensor([self.first, self.exponent, self.count])
        return {"counts": self.counts.clone(), "numbers": numbers, "lo": self.lo, "hi": self.hi}

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> Self:
        """The inverse of `state`."""
        first, exponent, count = (int(v) for v in state["numbers"])
        return cls(state["counts"].clone(), first, exponent, state["lo"], state["hi"], count)

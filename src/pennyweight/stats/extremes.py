"""Least and greatest values: running, averaged over samples, and exponentially averaged over batches."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor

from pennyweight.stats import stats


def _none() -> Tensor:
    return torch.tensor(0.0, dtype=torch.float64)


@stats.register("minmax")
@dataclass
class Extremes:
    """Running minimum and maximum of everything seen. Merging is exact and in any order.

    lo, hi: 0-d float32; +inf and -inf while nothing was seen.
    """

    lo: Tensor = field(default_factory=lambda: torch.tensor(float("inf")))
    hi: Tensor = field(default_factory=lambda: torch.tensor(float("-inf")))
    count: int = 0

    def update(self, x: Tensor) -> None:
        """Take in a tensor of any shape; an empty one changes nothing."""
        if x.numel():
            lo, hi = torch.aminmax(x.detach().float())
            self.lo, self.hi = torch.minimum(self.lo, lo), torch.maximum(self.hi, hi)
            self.count += x.numel()

    def merge(self, other: Self) -> None:
        """Take in everything that `other` has seen."""
        self.lo, self.hi = torch.minimum(self.lo, other.lo), torch.maximum(self.hi, other.hi)
        self.count += other.count

    def state(self) -> dict[str, Tensor]:
        """Plain tensors."""
        return {"lo": self.lo, "hi": self.hi, "count": torch.tensor(self.count)}

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> Self:
        """The inverse of `state`."""
        return cls(state["lo"], state["hi"], int(state["count"]))


@stats.register("mean_minmax")
@dataclass
class MeanExtremes:
    """Mean over samples (axis 0) of each sample's minimum and maximum: robust against a single odd sample.

        lo = mean_n min(x_n),  hi = mean_n max(x_n)

    Sums are float64, so merging in another order agrees to rounding error.
    Source: the "averaged" clipping of Distiller (IntelLabs/distiller, algo_quantization.md).
    """

    lo_sum: Tensor = field(default_factory=_none)
    hi_sum: Tensor = field(default_factory=_none)
    samples: int = 0
    count: int = 0

    @property
    def lo(self) -> Tensor:
        """Mean of the samples' minima, 0-d float32; +inf while nothing was seen."""
        return (self.lo_sum / self.samples).float() if self.samples else torch.tensor(float("inf"))

    @property
    def hi(self) -> Tensor:
        """Mean of the samples' maxima, 0-d float32; -inf while nothing was seen."""
        return (self.hi_sum / self.samples).float() if self.samples else torch.tensor(float("-inf"))

    def update(self, x: Tensor) -> None:
        """Take in [samples, ...]; a 0-d tensor is one sample."""
        if x.numel():
            rows = x.detach().float().reshape(x.shape[0] if x.ndim else 1, -1)
            self.lo_sum = self.lo_sum + rows.amin(1).double().sum()
            self.hi_sum = self.hi_sum + rows.amax(1).double().sum()
            self.samples += rows.shape[0]
            self.count += x.numel()

    def merge(self, other: Self) -> None:
        """Take in everything that `other` has seen."""
        self.lo_sum = self.lo_sum + other.lo_sum
        self.hi_sum = self.hi_sum + other.hi_sum
        self.samples += other.samples
        self.count += other.count

    def state(self) -> dict[str, Tensor]:
        """Plain tensors."""
        numbers = torch.tensor([self.samples, self.count])
        return {"lo_sum": self.lo_sum, "hi_sum": self.hi_sum, "numbers": numbers}

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> Self:
        """The inverse of `state`."""
        samples, count = (int(v) for v in state["numbers"])
        return cls(state["lo_sum"], state["hi_sum"], samples, count)


@stats.register("moving_minmax")
@dataclass
class MovingExtremes:
    """Exponential moving average of each batch's minimum and maximum: `m <- m + rate * (x - m)`, `m0 = x0`.

    Depends on the order of the batches by its nature. Merging weighs both sides by their number of batches.
    Source: Jacob et al. 2018 (arXiv:1712.05877), section 3.1; rate as in torch.ao's MovingAverageMinMaxObserver.
    """

    lo: Tensor = field(default_factory=lambda: torch.tensor(float("inf")))
    hi: Tensor = field(default_factory=lambda: torch.tensor(float("-inf")))
    count: int = 0
    batches: int = 0
    rate: float = 0.01

    def update(self, x: Tensor) -> None:
        """Take in one batch of any shape."""
        if not x.numel():
            return
        lo, hi = torch.aminmax(x.detach().float())
        if self.batches == 0:
            self.lo, self.hi = lo, hi
        else:
            self.lo, self.hi = self.lo + self.rate * (lo - self.lo), self.hi + self.rate * (hi - self.hi)
        self.batches += 1
        self.count += x.numel()

    def merge(self, other: Self) -> None:
        """Average with `other`, weighted by batches."""
        if other.batches == 0:
            return
        total = self.batches + other.batches
        if self.batches == 0:
            self.lo, self.hi = other.lo, other.hi
        else:
            share = other.batches / total
            self.lo, self.hi = self.lo + share * (other.lo - self.lo), self.hi + share * (other.hi - self.hi)
        self.batches, self.count = total, self.count + other.count

    def state(self) -> dict[str, Tensor]:
        """Plain tensors."""
        numbers = torch.tensor([self.count, self.batches])
        return {"lo": self.lo, "hi": self.hi, "numbers": numbers, "rate": torch.tensor(self.rate)}

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> Self:
        """The inverse of `state`."""
        count, batches = (int(v) for v in state["numbers"])
        return cls(state["lo"], state["hi"], count, batches, float(state["rate"]))

"""Mean and variance per channel, streamed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor

from pennyweight.stats import stats


def _empty() -> Tensor:
    return torch.zeros(0, dtype=torch.float64)


@stats.register("moments")
@dataclass
class Moments:
    """Count, mean and sum of squared deviations per channel (axis 1; axis 0 of a vector), with the extremes.

    Merging: `d = mb - ma`, `m = ma + d * nb / n`, `M2 = M2a + M2b + d^2 * na * nb / n`, float64.
    Source: Chan, Golub, LeVeque 1979, "Updating formulae and a pairwise algorithm for computing sample variances".
    """

    mean: Tensor = field(default_factory=_empty)
    m2: Tensor = field(default_factory=_empty)
    rows: int = 0
    lo: Tensor = field(default_factory=lambda: torch.tensor(float("inf")))
    hi: Tensor = field(default_factory=lambda: torch.tensor(float("-inf")))
    count: int = 0

    def update(self, x: Tensor) -> None:
        """Take in [n, channels, ...] or [channels]."""
        if not x.numel():
            return
        x = x.detach().double()
        rows = x.reshape(1, -1) if x.ndim < 2 else x.movedim(1, -1).reshape(-1, x.shape[1])
        mean = rows.mean(0)
        lo, hi = torch.aminmax(rows.float())
        part = type(self)(mean, ((rows - mean) ** 2).sum(0), rows.shape[0], lo, hi, x.numel())
        self.merge(part)

    def merge(self, other: Self) -> None:
        """Take in everything that `other` has seen."""
        if other.rows == 0:
            return
        if self.rows == 0:
            self.mean, self.m2, self.rows = other.mean, other.m2, other.rows
        else:
            n = self.rows + other.rows
            d = other.mean - self.mean
            self.mean = self.mean + d * (other.rows / n)
            self.m2 = self.m2 + other.m2 + d * d * (self.rows * other.rows / n)
            self.rows = n
        self.lo, self.hi = torch.minimum(self.lo, other.lo), torch.maximum(self.hi, other.hi)
        self.count += other.count

    @property
    def variance(self) -> Tensor:
        """Population variance per channel, float64."""
        return self.m2 / max(self.rows, 1)

    def state(self) -> dict[str, Tensor]:
        """Plain tensors."""
        numbers = torch.tensor([self.rows, self.count])
        return {"mean": self.mean, "m2": self.m2, "numbers": numbers, "lo": self.lo, "hi": self.hi}

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> Self:
        """The inverse of `state`."""
        rows, count = (int(v) for v in state["numbers"])
        return cls(state["mean"], state["m2"], rows, state["lo"], state["hi"], count)

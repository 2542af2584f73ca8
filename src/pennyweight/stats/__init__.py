"""Statistics that calibration collects: mergeable, of bounded memory. One file per statistic.

A statistic is made empty, updated with tensors and merged with others of its kind; the order does not matter.
"""

from __future__ import annotations

from typing import Protocol, Self, runtime_checkable

from torch import Tensor

from pennyweight.registry import Registry


@runtime_checkable
class Statistic(Protocol):
    """What a range rule reads: extremes of the shape of the blocks (0-d for a whole-tensor statistic)."""

    @property
    def lo(self) -> Tensor:
        """Least value."""
        ...

    @property
    def hi(self) -> Tensor:
        """Greatest value."""
        ...

    @property
    def count(self) -> int:
        """Number of values."""
        ...

    def update(self, x: Tensor) -> None:
        """Take in the values of one tensor."""
        ...

    def merge(self, other: Self) -> None:
        """Take in everything that another statistic of this kind has seen."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Plain tensors, to save or to send to another process."""
        ...

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> Self:
        """The inverse of `state`."""
        ...


@runtime_checkable
class Distribution(Statistic, Protocol):
    """A statistic that also knows how the values are distributed."""

    def support(self) -> tuple[Tensor, Tensor]:
        """Values [*blocks, n], ascending where they are bins, and their weights, same shape."""
        ...


stats: Registry[type[Statistic]] = Registry("statistics", "pennyweight.stats")

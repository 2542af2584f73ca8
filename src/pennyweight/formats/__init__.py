"""Grids: what a code stands for. One file per family; each entry of `grids` is a `Grid`."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from pennyweight.registry import Registry


@runtime_checkable
class Grid(Protocol):
    """The levels of a number format, before scaling."""

    @property
    def name(self) -> str:
        """Registry name."""
        ...

    @property
    def bits(self) -> int:
        """Stored bits of a code."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """What holds a code."""
        ...

    @property
    def has_zero(self) -> bool:
        """Whether 0.0 is a level."""
        ...

    @property
    def affine(self) -> bool:
        """Whether levels are consecutive integers, so that an integer zero point keeps zero exact."""
        ...

    def levels(self) -> Tensor:
        """All levels, ascending, float32 [n]."""
        ...

    def encode(self, x: Tensor, zero: Tensor | None = None) -> Tensor:
        """Nearest codes of already scaled values; `zero` is added after rounding."""
        ...

    def decode(self, codes: Tensor) -> Tensor:
        """Levels of codes, float32."""
        ...


grids: Registry[Grid] = Registry("grids", "pennyweight.formats")

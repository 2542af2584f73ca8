"""Grids: what a code stands for. One file per family; each entry of `grids` is a `Grid`."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from pennyweight.registry import Registry


@runtime_checkable
class Grid(Protocol):
    """The levels of a number format, before scaling.

    Attributes:
        name: registry name, as it stands in a spec.
        bits: stored bits of a code.
        dtype: torch dtype that holds a code.
        has_zero: whether 0.0 is a level.
        affine: whether levels are consecutive integers, so that an integer zero point keeps zero exact.
    """

    name: str
    bits: int
    dtype: torch.dtype
    has_zero: bool
    affine: bool

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

"""The values themselves, block by block: the exact statistic of a tensor that is all there, such as a weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from pennyweight.qtensor import per_block
from pennyweight.spec import QuantSpec


@dataclass
class Values:
    """Elements of each block: `blocks` is [*scale_shape, elements of a block], float32.

    Not a streaming statistic, and not registered: it holds everything it saw.
    """

    blocks: Tensor

    @classmethod
    def of(cls, x: Tensor, spec: QuantSpec) -> Self:
        """Split `x` into the blocks of `spec`.

        Raises:
            SpecError: if the spec does not fit the shape.
        """
        return cls(per_block(x.detach().float(), spec.scale_shape(tuple(x.shape))))

    @property
    def lo(self) -> Tensor:
        """Least value of each block, `scale_shape`."""
        return self._reduced(torch.amin)

    @property
    def hi(self) -> Tensor:
        """Greatest value of each block, `scale_shape`."""
        return self._reduced(torch.amax)

    def _reduced(self, reduce: object) -> Tensor:
        if self.blocks.numel() == 0:
            return torch.zeros(self.blocks.shape[:-1])
        out: Tensor = reduce(self.blocks, dim=-1)  # type: ignore[operator]
        return out

    @property
    def count(self) -> int:
        """Elements per block."""
        return self.blocks.shape[-1]

    def update(self, x: Tensor) -> None:
        """Append further elements to every block; `x` is [*scale_shape, n]."""
        self.blocks = torch.cat([self.blocks, x.detach().float()], -1)

    def merge(self, other: Self) -> None:
        """Append the elements of `other`."""
        self.update(other.blocks)

    def support(self) -> tuple[Tensor, Tensor]:
        """The elements and weights of one each."""
        return self.blocks, torch.ones_like(self.blocks)

    def state(self) -> dict[str, Tensor]:
        """Plain tensors."""
        return {"blocks": self.blocks}

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> Self:
        """The inverse of `state`."""
        return cls(state["blocks"])

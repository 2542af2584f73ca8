"""Layers of floats whose weights are on levels that are no bytes: fp8, fp6, NF4, powers of sqrt(2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pennyweight.formats import grids
from pennyweight.formats.codebook import Codebook
from pennyweight.formats.minifloat import Minifloat
from pennyweight.nn.packing import by_row, pack_codes
from pennyweight.plan import LayerPlan
from pennyweight.qtensor import QTensor


def on_levels(layer: LayerPlan, q: QTensor) -> bool:
    """Whether a weight is on levels that are no multiples of one unit within a byte, and meets floats."""
    grid = grids[q.spec.grid]
    return not layer.inputs and isinstance(grid, Codebook) and grid.multiples is None


class Levels(nn.Module):
    """A weight `levels[codes] * scale`, and the bias of its layer.

    codes: uint8 [out, n], or [out, ceil(n / 2)] of codes of at most 4 bits, low nibble first. levels: float32 [2^bits];
    patterns that are no finite number stand for zero there, and no code names them. scale: float32 [out or 1, groups].
    bias: float32 [out] or None.
    """

    codes: Tensor
    levels: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, layer: LayerPlan, q: QTensor, bias: Tensor | None) -> None:
        super().__init__()
        grid = grids[q.spec.grid]
        assert isinstance(grid, Codebook)
        self.layer = layer
        self.rows, self.n = q.codes.shape
        self.bits = 4 if grid.bits <= 4 else 8
        levels = torch.zeros(1 << self.bits, device=q.codes.device)
        known = grid.table() if isinstance(grid, Minifloat) else grid.levels()
        levels[: len(known)] = known.nan_to_num(0.0, 0.0, 0.0)
        scale = by_row(q.scales(), self.rows)
        self.register_buffer("codes", pack_codes(q.codes, 4) if self.bits == 4 else q.codes.contiguous())
        self.register_buffer("levels", levels)
        self.register_buffer("scale", scale.contiguous())
        self.register_buffer("bias", bias)

    def extra_repr(self) -> str:
        """Scheme, for printing."""
        return f"weight={self.layer.weight}, shape={(self.rows, self.n)}"


class LevelLinear(Levels):
    """`y = x (levels[codes] * scale)^T + b`."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        y: Tensor = torch.ops.pennyweight.linear_levels(
            x, self.codes, self.levels, self.scale, self.bias, self.bits, self.n
        )
        return y

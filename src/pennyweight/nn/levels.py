"""Linear layers of floats whose weights are on levels that are no integers: fp8, fp6, NF4, powers of sqrt(2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pennyweight.formats import grids
from pennyweight.formats.codebook import Codebook
from pennyweight.formats.minifloat import Minifloat
from pennyweight.plan import LayerPlan
from pennyweight.qtensor import QTensor


def on_levels(layer: LayerPlan, q: QTensor) -> bool:
    """Whether a weight is on levels that are no multiples of one unit, and meets floats."""
    grid = grids[q.spec.grid]
    return not layer.inputs and isinstance(grid, Codebook) and grid.multiples is None


class LevelLinear(nn.Module):
    """`y = x (levels[codes] * scale)^T + b`.

    codes: uint8 [out, in], or [out, ceil(in / 2)] of codes of at most 4 bits, low nibble first. levels: float32
    [2^bits]; patterns that are no finite number stand for zero there, and no code names them. scale: float32 [out or 1,
    groups]. bias: float32 [out] or None.
    """

    codes: Tensor
    levels: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, layer: LayerPlan, q: QTensor) -> None:
        super().__init__()
        grid = grids[q.spec.grid]
        assert isinstance(grid, Codebook)
        self.layer = layer
        self.out_features, self.in_features = q.codes.shape
        self.bits = 4 if grid.bits <= 4 else 8
        levels = torch.zeros(1 << self.bits, device=q.codes.device)
        known = grid.table() if isinstance(grid, Minifloat) else grid.levels()
        levels[: len(known)] = known.nan_to_num(0.0, 0.0, 0.0)
        scale = q.scales()
        rows = self.out_features
        if 1 < len(scale) < rows:  # blocks of several rows: one scale for each row
            scale = scale.repeat_interleave(rows // len(scale), 0)
        self.register_buffer("codes", pack_pairs(q.codes) if self.bits == 4 else q.codes.contiguous())
        self.register_buffer("levels", levels)
        self.register_buffer("scale", scale.contiguous())

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        weight: Tensor = torch.ops.pennyweight.decode_levels(
            self.codes, self.levels, self.scale, self.bits, self.in_features
        )
        return F.linear(x, weight.to(x.dtype), self.bias)

    def extra_repr(self) -> str:
        """Scheme, for printing."""
        return f"weight={self.layer.weight}, shape={(self.out_features, self.in_features)}"


def pack_pairs(codes: Tensor) -> Tensor:
    """uint8 codes [rows, n] of 0 .. 15 to uint8 [rows, ceil(n / 2)], low nibble first."""
    if codes.shape[1] % 2:
        codes = torch.cat([codes, codes.new_zeros(codes.shape[0], 1)], 1)
    return (codes[:, ::2] | (codes[:, 1::2] << 4)).contiguous()

"""Roundings that are learned: by sigmoids that are driven to 0 or 1, or by the signs of gradients."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pennyweight.formats import grids
from pennyweight.formats.integer import Integer
from pennyweight.qtensor import QTensor, per_element

STRETCH, SHIFT = 1.2, -0.1  # of the sigmoid, so that 0 and 1 are reached


def can_soften(q: QTensor) -> bool:
    """Whether codes are consecutive integers, so that rounding is up or down."""
    return isinstance(grids[q.spec.grid], Integer)


class SoftRounding(nn.Module):
    """Stands for a weight while its rounding is learned.

        w' = s (clamp(floor(w / s) + h(v) + z, qmin, qmax) - z),  h(v) = clamp(1.2 sigmoid(v) - 0.1, 0, 1)

    starting from `h = w / s - floor(w / s)`, that is w' = w. Scales are fixed.
    Source: Nagel et al. 2020, "Up or Down?" (arXiv:2004.10568), equations 21 to 23.
    """

    def __init__(self, matrix: Tensor, q: QTensor) -> None:
        super().__init__()
        self.q = q
        grid = grids[q.spec.grid]
        assert isinstance(grid, Integer)
        self.qmin, self.qmax = grid.qmin, grid.qmax
        scale = q.scales()
        shape = tuple(matrix.shape)
        self.scale = per_element(torch.where(scale == 0, torch.ones_like(scale), scale), shape)
        zero = torch.zeros_like(scale) if q.zero is None else q.zero.float()
        self.zero = per_element(zero, shape)
        place = matrix.detach().float() / self.scale + self.zero
        self.base = torch.floor(place)
        part = (place - self.base).clamp(0.01, 0.99)
        self.logits = nn.Parameter(-torch.log(STRETCH / (part - SHIFT) - 1))

    def share(self) -> Tensor:
        """h, [out, in], from 0 (down) to 1 (up)."""
        return (torch.sigmoid(self.logits) * STRETCH + SHIFT).clamp(0, 1)

    def forward(self, matrix: Tensor) -> Tensor:
        """The weight, partly rounded."""
        codes = (self.base + self.share()).clamp(self.qmin, self.qmax)
        return (codes - self.zero) * self.scale

    def undecided(self, power: float) -> Tensor:
        """`mean(1 - |2 h - 1|^power)`: 0 where every weight is at a level."""
        return (1 - (2 * self.share() - 1).abs() ** power).mean()

    def codes(self) -> QTensor:
        """What was learned."""
        up = (self.logits.detach() >= 0).float()
        codes = (self.base + up).clamp(self.qmin, self.qmax).to(self.q.codes.dtype)
        return QTensor(codes, self.q.scale, self.q.zero, self.q.spec)


class SignRounding(nn.Module):
    """As `SoftRounding`, with offsets that are added before rounding and follow the signs of their gradients.

        w' = s (clamp(rint(w / s + v) + z, qmin, qmax) - z),  v in [-1/2, 1/2],  dw'/dv = s

    Source: Cheng et al. 2023, "SignRound" (arXiv:2309.05516), equation 3.
    """

    def __init__(self, matrix: Tensor, q: QTensor) -> None:
        super().__init__()
        self.soft = SoftRounding(matrix, q)
        self.q = q
        self.place = matrix.detach().float() / self.soft.scale
        self.logits = nn.Parameter(torch.zeros_like(self.place))

    def forward(self, matrix: Tensor) -> Tensor:
        """The weight, rounded; gradients go to the offsets as if it were not."""
        moved = self.place + self.logits
        whole = moved + (torch.round(moved) - moved).detach()
        codes = (whole + self.soft.zero).clamp(self.soft.qmin, self.soft.qmax)
        return (codes - self.soft.zero) * self.soft.scale

    def undecided(self, power: float) -> Tensor:
        """Nothing is."""
        return torch.zeros(())

    def codes(self) -> QTensor:
        """What was learned."""
        codes = torch.round(self.place + self.logits.detach()) + self.soft.zero
        codes = codes.clamp(self.soft.qmin, self.soft.qmax).to(self.q.codes.dtype)
        return QTensor(codes, self.q.scale, self.q.zero, self.q.spec)

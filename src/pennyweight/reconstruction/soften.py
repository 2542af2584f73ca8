"""Roundings that are learned: by sigmoids driven to 0 or 1, by the signs of gradients, or with the weights free."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pennyweight.formats import grids
from pennyweight.formats.integer import Integer
from pennyweight.qtensor import QParams, QTensor, per_element, quantize

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

    Args:
        matrix: the weight, [out, in].
        q: its codes, whose scales and zero points are kept.

    Source: Cheng et al. 2023, "SignRound" (arXiv:2309.05516), equations 3 to 5.
    """

    def __init__(self, matrix: Tensor, q: QTensor) -> None:
        super().__init__()
        self.q, shape = q, tuple(matrix.shape)
        grid = grids[q.spec.grid]
        assert isinstance(grid, Integer)
        self.qmin, self.qmax = grid.qmin, grid.qmax
        scale = q.scales()
        self.scale = per_element(torch.where(scale == 0, torch.ones_like(scale), scale), shape)
        zero = torch.zeros_like(scale) if q.zero is None else q.zero.float()
        self.zero = per_element(zero, shape)
        self.place = matrix.detach().float() / self.scale
        self.logits = nn.Parameter(torch.zeros(shape))

    def forward(self, matrix: Tensor) -> Tensor:
        """The weight, rounded; gradients go to what is learned as if it were not."""
        moved = self.place + self.logits
        whole = moved + (torch.round(moved) - moved).detach()
        return ((whole + self.zero).clamp(self.qmin, self.qmax) - self.zero) * self.scale

    def undecided(self, power: float) -> Tensor:
        """Nothing is."""
        return torch.zeros(())

    def codes(self) -> QTensor:
        """What was learned."""
        moved = torch.round(self.place + self.logits.detach()) + self.zero
        codes = moved.clamp(self.qmin, self.qmax).to(self.q.codes.dtype)
        return QTensor(codes, self.q.scale, self.q.zero, self.q.spec)


class FreeRounding(nn.Module):
    """Stands for a weight that may take any level, under a scale that is learned beside it.

        w' = s e^a (clamp(rint(p) + z, qmin, qmax) - z),  dw'/dp = s e^a to half a step beyond the ends, 0 further out

    p: the weight in steps, [out, in], from `w / s`, or from the code where that is another level (a solver's choice
    stays); a: of every scale, from 0. The gradient of `a` is exact, as p counts steps and does not change with it.
    Source: Hubara et al. 2021, "Accurate Post Training Quantization With Small Calibration Sets" (AdaQuant,
    arXiv:2006.10518), equation 2; weights in steps and the factor `e^a` in the place of a learned scale are ours.
    """

    def __init__(self, matrix: Tensor, q: QTensor) -> None:
        super().__init__()
        self.q, self.matrix = q, matrix.detach().float()
        grid = grids[q.spec.grid]
        assert isinstance(grid, Integer)
        scale, shape = q.scales(), tuple(matrix.shape)
        self.scale = torch.where(scale == 0, torch.ones_like(scale), scale)
        zero = torch.zeros_like(scale) if q.zero is None else q.zero.float()
        wide = per_element(zero, shape)
        self.low, self.high = grid.qmin - wide, grid.qmax - wide
        place = self.matrix / per_element(self.scale, shape)
        level = q.codes.reshape(shape).float() - wide
        nearest = torch.minimum(torch.maximum(torch.round(place), self.low), self.high)
        place = torch.where(nearest == level, place, level)
        self.place = nn.Parameter(torch.minimum(torch.maximum(place, self.low - 0.5), self.high + 0.5))
        self.stretch = nn.Parameter(torch.zeros_like(self.scale))

    def level(self) -> Tensor:
        """The level of every weight in steps, [out, in]; gradients go to p as if it were not rounded."""
        p = self.place
        whole = torch.minimum(torch.maximum(torch.round(p.detach()), self.low), self.high)
        inside = (p.detach() >= self.low - 0.5) & (p.detach() <= self.high + 0.5)  # what rounds to a level
        return whole + (p - p.detach()) * inside

    def forward(self, matrix: Tensor) -> Tensor:
        """The weight, rounded."""
        return self.level() * per_element(self.scale * self.stretch.exp(), tuple(self.matrix.shape))

    def undecided(self, power: float) -> Tensor:
        """Nothing is."""
        return torch.zeros(())

    def codes(self) -> QTensor:
        """What was learned, under scales as they are stored."""
        scale = self.scale * self.stretch.detach().exp()
        stored = quantize(self.matrix, self.q.spec, QParams(scale, self.q.zero)).scale
        zero = 0.0 if self.q.zero is None else per_element(self.q.zero.float(), tuple(self.matrix.shape))
        codes = (self.level().detach() + zero).reshape(self.q.codes.shape).to(self.q.codes.dtype)
        return QTensor(codes, stored, self.q.zero, self.q.spec)

"""Float32 functions in torch, step for step as `program.ops.functions` and `program.ops.normalize` lay them down.

Each step is one torch call on float32, so nothing is contracted or reordered: the bits are those of the interpreter.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pennyweight.program.ops.functions import EXP_COEFFICIENTS, EXP_HIGH, EXP_LOW, LN2_HI, LN2_LO, LOG2E
from pennyweight.program.ops.normalize import LANES

_COEFFICIENTS = [float(c) for c in EXP_COEFFICIENTS]
_LOG2E, _LN2_HI, _LN2_LO = float(LOG2E), float(LN2_HI), float(LN2_LO)


def exp(x: Tensor) -> Tensor:
    """e^x, see `program.ops.functions.exp`. float32, any shape."""
    low, high = float(EXP_LOW), float(EXP_HIGH)
    t = torch.nan_to_num(x, nan=low, posinf=high, neginf=low).clamp_(low, high)
    n = (t * _LOG2E).round_()
    r = t.sub_(n * _LN2_HI).sub_(n * _LN2_LO)
    p = torch.full_like(r, _COEFFICIENTS[0])
    for c in _COEFFICIENTS[1:]:
        p = p.mul_(r).add_(c)
    y = p.mul_(r * r).add_(r).add_(1.0)
    power = n.to(torch.int32).add_(127).bitwise_left_shift_(23).view(torch.float32)
    return y.mul_(power).masked_fill_(x < low, 0.0)


def sigmoid(x: Tensor) -> Tensor:
    """`1 / (1 + e^-x)`. float32, any shape."""
    return torch.div(x.new_ones(()), exp(-x).add_(1.0))


def tanh(x: Tensor) -> Tensor:
    """`sign(x) (1 - e) / (1 + e)`, `e = e^(-2 |x|)`. float32, any shape."""
    e = exp(x.abs() * -2.0)
    return ((1.0 - e) / (e + 1.0)).copysign_(x)


def lane_sum(x: Tensor) -> Tensor:
    """Sum over the last axis in 16 lanes, see `program.ops.normalize.lane_sum`. float32 [..., n] -> [..., 1]."""
    n = x.shape[-1]
    blocks = torch.nn.functional.pad(x, (0, -n % LANES if n else LANES)).unflatten(-1, (-1, LANES))
    lanes = torch.zeros_like(blocks[..., 0, :])
    for j in range(blocks.shape[-2]):
        lanes = lanes + blocks[..., j, :]
    for half in (8, 4, 2, 1):
        lanes = lanes[..., :half] + lanes[..., half : 2 * half]
    return lanes


def softmax(x: Tensor) -> Tensor:
    """`e / lane_sum(e)`, `e = exp(x - max x)`, over the last axis. float32 [..., n].

    A row of nothing but -inf (all keys masked) gives equal shares.
    """
    if x.shape[-1] == 0:
        return x
    e = exp(x - x.amax(-1, keepdim=True))
    return e / lane_sum(e)

"""What the estimators share: rounding to an integer grid under a scale per block, and its gradient."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from pennyweight.errors import SpecError
from pennyweight.formats import grids
from pennyweight.formats.codebook import Codebook
from pennyweight.formats.integer import Integer
from pennyweight.qtensor import QParams, per_block, unblock
from pennyweight.ranges import params_of_range
from pennyweight.spec import QuantSpec

STEP, CLIP = 0, 1  # what the gradient of the scale is, see `rounded`


def bounds(spec: QuantSpec) -> tuple[float, float]:
    """Least and greatest level of a grid; of integers, these are codes.

    Raises:
        SpecError: for grids that are neither integers nor a codebook.
    """
    grid = grids[spec.grid]
    if isinstance(grid, Integer):
        return grid.qmin, grid.qmax
    if not isinstance(grid, Codebook):
        raise SpecError(
            "only integers and codebooks can be trained so far",
            spec=str(spec),
            hint="Use int8, int4, apot4, ...",
        )
    return grid.values[0], grid.values[-1]


def positive_bound(spec: QuantSpec) -> float:
    """Q_P: how many steps a positive value has on the grid; half of all steps where a zero point is stored.

    On a codebook the greatest level, so that the mean magnitude sets where values are cut off.
    """
    low, high = bounds(spec)
    if not isinstance(grids[spec.grid], Integer):
        return high
    return (high - low) / 2 if spec.zero != "none" and low == 0 else float(max(high, 1))


def rounded(
    x: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    spec: QuantSpec,
    *,
    delta: float = 0.0,
    gain: float = 1.0,
    learns: int = STEP,
) -> Tensor:
    """`x' = (clamp(rint(x * r) + z, qmin, qmax) - z) * s` with straight-through gradients.

        dx'/dx = 1 inside of the range, 0 outside; times 1 + delta * sign(g) * (x r - rint(x r)) where delta > 0
        dx'/ds = gain * (rint(x r) - x r) inside, gain * (qmin - z) below, gain * (qmax - z) above; with `CLIP` 0 inside
        dx'/dz = 0 inside, -gain * s outside

    Inside means that the unrounded code is within the bounds. Shapes: x any; scale and zero `spec.scale_shape(x.shape)`
    in any shape of as many elements. Grids of other levels: see `leveled`.
    """
    if not isinstance(grids[spec.grid], Integer):
        return leveled(x, scale, spec, gain=gain, learns=learns)
    low, high = bounds(spec)
    if scale.numel() > 1:
        shape = spec.scale_shape(tuple(x.shape))
        if not _in_rows(tuple(x.shape), shape):
            blocks = per_block(x, shape)  # [*shape, elements of a block]
            y = _op(blocks.contiguous(), scale, zero, low, high, delta, gain, learns)
            return unblock(y, shape, tuple(x.shape))
    return _op(x, scale, zero, low, high, delta, gain, learns)


def leveled(x: Tensor, scale: Tensor, spec: QuantSpec, *, gain: float = 1.0, learns: int = STEP) -> Tensor:
    """`x' = s L(x / s)`, L the nearest level of the grid, with straight-through gradients.

        dx'/dx = 1 where x / s lies within the levels, 0 outside
        dx'/ds = gain * (L(x / s) - x / s) inside, gain * L(x / s) outside; with `CLIP` 0 inside

    Where all levels are of one magnitude (binary) the gradient of x is that of the clipped sign: 1 where |x / s| <= 1.
    Source: Li et al. 2020, APoT (arXiv:1909.13144), equation 8; Hubara et al. 2016 (arXiv:1602.02830), section 1.3.
    """
    grid = grids[spec.grid]
    levels = grid.levels()
    shape = spec.scale_shape(tuple(x.shape))
    wide = unblock(
        scale.reshape(*shape, 1).expand(*shape, x.numel() // max(scale.numel(), 1)), shape, tuple(x.shape)
    )
    t = (x / wide).detach()
    level = grid.decode(grid.encode(t)).to(x.dtype)
    inside = (t >= float(levels[0])) & (t <= float(levels[-1]))
    within = torch.zeros_like(t) if learns == CLIP else level - t
    slope = torch.where(inside, within, level) * gain
    # the value of the first term, the gradients of the two others, which are zero
    return (level * wide).detach() + inside * (x - x.detach()) + slope * (wide - wide.detach())


def _op(
    x: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    low: float,
    high: float,
    delta: float,
    gain: float,
    learns: int,
) -> Tensor:
    y: Tensor = torch.ops.pennyweight.fake_quantize(
        x, scale, zero, float(low), float(high), delta, gain, learns
    )
    return y


def _in_rows(shape: tuple[int, ...], blocks: tuple[int, ...]) -> bool:
    """Whether the elements of every block lie one after another: one axis is cut, those behind it are whole."""
    cut = next((i for i, (n, b) in enumerate(zip(shape, blocks, strict=True)) if n != b), len(shape))
    return all(b == 1 for b in blocks[cut + 1 :])


def lsq_gain(spec: QuantSpec, count: int) -> float:
    """`1 / sqrt(N Q_P)`, N the elements that share the scale. Esser et al. 2020 (arXiv:1902.08153), section 2.2."""
    return 1.0 / math.sqrt(max(count, 1) * positive_bound(spec))


def mean_magnitude(x: Tensor, spec: QuantSpec) -> QParams:
    """`s = 2 E|x| / sqrt(Q_P)` per block; zero points as of the extremes. Esser et al. 2020, section 2.1."""
    blocks = per_block(x.detach().float(), spec.scale_shape(tuple(x.shape)))
    ends = params_of_range(blocks.amin(-1), blocks.amax(-1), spec)
    if spec.zero != "none":
        return ends  # a zero point belongs to its range
    scale = 2.0 * blocks.abs().mean(-1) / math.sqrt(positive_bound(spec))
    return QParams(torch.where(scale > 0, scale, ends.scale))


def extremes(x: Tensor, spec: QuantSpec) -> QParams:
    """The range of every block."""
    blocks = per_block(x.detach().float(), spec.scale_shape(tuple(x.shape)))
    return params_of_range(blocks.amin(-1), blocks.amax(-1), spec)


def zero_of(held: Mapping[str, Tensor], spec: QuantSpec) -> Tensor | None:
    """The zero point that is held, if the spec has one."""
    return held["zero"] if spec.zero != "none" else None

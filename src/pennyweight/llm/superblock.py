"""Scales and minima of groups as whole multiples of two numbers a superblock: what Q4_K and Q5_K of llama.cpp store.

    w' = s_g q - m_g,   s_g = d a_g,   m_g = e b_g,   a_g in 1 .. 63,  b_g in 0 .. 63

with d and e in half precision for every eight groups. As a spec: a float zero point `z_g = m_g / s_g`, and scales that
are quantized themselves, `uint4[32]+zf^(uint6[8]^fp16)`.
Source: the block layouts of ggml (k-quants), as the package `gguf` reads them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pennyweight.errors import SpecError
from pennyweight.qtensor import QParams, QTensor
from pennyweight.ranges import RangeRule
from pennyweight.spec import QuantSpec
from pennyweight.stats import Statistic

TOP = 63  # greatest multiple
LEAST = 2.0**-24  # of half precision


def is_superblock(spec: QuantSpec) -> bool:
    """Whether a spec is one of these."""
    return spec.zero == "float" and isinstance(spec.scale, QuantSpec) and spec.scale.grid == "uint6"


@dataclass(frozen=True)
class Superblock:
    """A range rule whose result is moved to the nearest that can be stored.

    Args:
        rule: finds scales and zero points.
    """

    rule: RangeRule
    needs: ClassVar[str] = "histogram"

    def __call__(self, stat: Statistic, spec: QuantSpec) -> QParams:
        """See the class."""
        found = self.rule(stat, spec)
        empty = (stat.hi <= 0) & (stat.lo >= 0)  # nothing but zeros: their scale is 1, which is not to count
        return storable(
            QParams(torch.where(empty, torch.zeros_like(found.scale), found.scale), found.zero), spec
        )


def storable(params: QParams, spec: QuantSpec) -> QParams:
    """The nearest scales and minima that can be stored, see the module. Shapes: [out, groups], as they came.

    Raises:
        SpecError: if groups do not fill superblocks.
    """
    assert isinstance(spec.scale, QuantSpec)
    assert params.zero is not None
    size = spec.scale.block[-1] or params.scale.shape[-1]
    if params.scale.shape[-1] % size:
        raise SpecError(
            f"{params.scale.shape[-1]} groups do not fill superblocks of {size}", spec=str(spec),
            hint="The layer's inputs must be a multiple of 256.",
        )  # fmt: skip
    shape = params.scale.shape
    scale = params.scale.reshape(*shape[:-1], -1, size)
    minimum = (params.zero.reshape(scale.shape) * scale).clamp_min(0.0)
    d, e = _step(scale), _step(minimum)
    a = torch.round(scale / d).clamp(1, TOP)
    b = torch.round(minimum / e).clamp(0, TOP)
    stored = a * d
    return QParams(stored.reshape(shape), (b * e / stored).reshape(shape))


def _step(x: Tensor) -> Tensor:
    """What the values of each superblock are multiples of, as half precision has it. [..., n] -> [..., 1]."""
    return (x.amax(-1, keepdim=True) / TOP).clamp_min(LEAST).half().float()


def multiples(q: QTensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """d, e [superblocks] as float16, a, b [superblocks, n] as uint8, of a quantized matrix, exactly.

    Raises:
        SpecError: if its minima are not whole multiples.
    """
    assert isinstance(q.scale, QTensor)
    assert q.zero is not None
    assert isinstance(q.spec.scale, QuantSpec)
    size = q.spec.scale.block[-1] or q.zero.shape[-1]
    d = q.scale.scales().reshape(-1)
    a = q.scale.codes.reshape(-1, size)
    minimum = (q.zero.float() * q.scales()).reshape(-1, size)
    most = minimum.amax(-1, keepdim=True)
    e, b = _step(minimum), torch.zeros_like(minimum)
    open_ = torch.ones_like(most, dtype=torch.bool)
    for top in range(TOP, 0, -1):  # the greatest is 63 steps, but for tiny ones
        step = (most / top).clamp_min(LEAST).half().float()
        times = torch.round(minimum / step)
        apart = (times * step - minimum).abs().amax(-1, keepdim=True)
        fits = (apart <= 1e-5 * most) & (times.amax(-1, keepdim=True) <= TOP)
        e, b = torch.where(open_ & fits, step, e), torch.where(open_ & fits, times, b)
        open_ = open_ & ~fits
        if not bool(open_.any()):
            break
    if bool(open_.any()) or float(minimum.min()) < 0:
        raise SpecError("minima of groups are no whole multiples of 6 bits", spec=str(q.spec),
                        hint="Methods rtn, searched and gptq keep them so.")  # fmt: skip
    return d.half(), e.reshape(-1).half(), a.to(torch.uint8), b.to(torch.uint8)

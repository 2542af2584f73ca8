"""Uniform integers of 2 to 8 bits, and 16: full range, narrow and unsigned.

    int8   -128 .. 127      int8n  -127 .. 127      uint8  0 .. 255

An asymmetric integer is any of them with `+z`; a signed scale is a matter of the range rule, not of the grid.
Source: Jacob et al. 2018 (arXiv:1712.05877), section 2.1; narrow range as in its section 3.1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pennyweight.formats import grids


@dataclass(frozen=True, slots=True)
class Integer:
    """Consecutive integers `qmin .. qmax`.

    encode: `q = clamp(rint(x) + zero, qmin, qmax)`, half to even; NaN -> qmin, infinities -> the extremes.
    decode: `q` as float32.
    """

    name: str
    bits: int
    qmin: int
    qmax: int
    dtype: torch.dtype
    has_zero: bool = True
    affine: bool = True

    def levels(self) -> Tensor:
        """All levels, ascending."""
        return torch.arange(self.qmin, self.qmax + 1, dtype=torch.float32)

    def encode(self, x: Tensor, zero: Tensor | None = None) -> Tensor:
        """Nearest codes; see the class."""
        q = torch.round(x)
        if zero is not None:
            q = q + zero
        low, high = float(self.qmin), float(self.qmax)
        # fmin(fmax(q, low), high), at several times its speed
        return q.clamp(low, high).nan_to_num(nan=low).to(self.dtype)

    def decode(self, codes: Tensor) -> Tensor:
        """Levels of codes."""
        return codes.float()


def _register(bits: int) -> None:
    half = 1 << (bits - 1)
    signed = torch.int8 if bits <= 8 else torch.int16
    unsigned = torch.uint8 if bits <= 8 else torch.int32
    grids.add(f"int{bits}", Integer(f"int{bits}", bits, -half, half - 1, signed))
    grids.add(f"int{bits}n", Integer(f"int{bits}n", bits, 1 - half, half - 1, signed))
    grids.add(f"uint{bits}", Integer(f"uint{bits}", bits, 0, 2 * half - 1, unsigned))


for _bits in (2, 3, 4, 5, 6, 7, 8, 16):
    _register(_bits)

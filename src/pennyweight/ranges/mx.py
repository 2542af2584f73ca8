"""Shared exponents of microscaling formats: scales that are powers of two, from the greatest magnitude of a block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor

from pennyweight.errors import NonFinite, SpecError, nearest
from pennyweight.formats import grids
from pennyweight.formats.codebook import Codebook
from pennyweight.formats.integer import Integer
from pennyweight.formats.minifloat import Minifloat
from pennyweight.qtensor import QParams
from pennyweight.ranges import ranges
from pennyweight.spec import QuantSpec
from pennyweight.stats import Statistic

LEAST, GREATEST = -127, 127  # exponents of e8m0


@ranges.register("mx")
@dataclass(frozen=True)
class Microscaling:
    """`s = 2^e`, e from amax, the greatest magnitude of a block, max the greatest level, emax = floor(log2 max).

        floor  e = floor(log2 amax) - emax            the OCP specification; values above max * s saturate
        ceil   e = ceil(log2 amax) - emax
        rceil  e = ceil(log2(amax / max))             nothing saturates
        even   e = floor(log2 amax') - emax           amax' is amax rounded to the mantissa of the element

    e is clamped to -127 .. 127, the exponents of `e8m0`; a block of zeros has scale 1. With the spec
    `fp4_e2m1[32]^e8m0` and its like these are MXFP8, MXFP6 and MXFP4.
    Source: Open Compute Project, Microscaling Formats (MX) 1.0, section 6.3; Rouhani et al. 2023 (arXiv:2310.10537),
    algorithm 1; Mishra et al. 2025 (arXiv:2506.08027) for rounding up.
    """

    rounding: Literal["floor", "ceil", "rceil", "even"] = "floor"
    needs: ClassVar[str] = "minmax"

    def __call__(self, stat: Statistic, spec: QuantSpec) -> QParams:
        """Scales of the statistic's blocks.

        Raises:
            SpecError: on an unknown rounding, or a zero point.
            NonFinite: on bounds that are not numbers.
        """
        if spec.zero != "none":
            raise SpecError("shared exponents have no zero point", spec=str(spec))
        amax = torch.maximum(-stat.lo, stat.hi).double()
        if not bool(torch.isfinite(amax).all()):
            raise NonFinite("a range has NaN or infinite bounds", spec=str(spec))
        grid = grids[spec.grid]
        top = float(grid.values[-1]) if isinstance(grid, Codebook) else float(cast("Integer", grid).qmax)
        emax = int(torch.frexp(torch.tensor(top, dtype=torch.float64)).exponent) - 1
        if self.rounding == "floor":
            found = _floor_log2(amax) - emax
        elif self.rounding == "ceil":
            found = _ceil_log2(amax) - emax
        elif self.rounding == "rceil":
            found = _ceil_log2(amax / top)
        elif self.rounding == "even":
            mantissa = grid.mantissa if isinstance(grid, Minifloat) else emax
            fraction, exponent = torch.frexp(amax)
            rounded = torch.round(torch.ldexp(fraction, torch.tensor(mantissa + 1)))
            found = _floor_log2(torch.ldexp(rounded, exponent - mantissa - 1)) - emax
        else:
            raise SpecError(
                f"rounding {self.rounding!r} is unknown",
                hint=nearest(self.rounding, ["floor", "ceil", "rceil", "even"], "roundings"),
            )
        scale = torch.exp2(found.clamp(LEAST, GREATEST).double())
        return QParams(torch.where(amax == 0, torch.ones_like(scale), scale).float())


def _floor_log2(x: Tensor) -> Tensor:
    return torch.frexp(x).exponent - 1


def _ceil_log2(x: Tensor) -> Tensor:
    fraction, exponent = torch.frexp(x)
    return exponent - (fraction == 0.5).to(exponent.dtype)

"""Floating point of 4 to 8 bits: a code is the bit pattern, sign, exponent, mantissa.

    fp8_e4m3   bias 7    max 448      no infinity, NaN is S.1111.111    OCP FP8; torch.float8_e4m3fn
    fp8_e5m2   bias 15   max 57344    infinities and NaN as in IEEE 754  OCP FP8; torch.float8_e5m2
    fp6_e3m2   bias 3    max 28       numbers alone
    fp6_e2m3   bias 1    max 7.5      numbers alone
    fp4_e2m1   bias 1    max 6        numbers alone

Source: Micikevicius et al. 2022 (arXiv:2209.05433), section 3; Open Compute Project, Microscaling Formats (MX) 1.0,
section 5.3.

A float may also be built for a layer, without subnormals, infinities and NaN, as Ristretto does: `Minifloat(...,
subnormals=False)`. Source: Gysel et al. 2018 (arXiv:1604.03168), section 4.3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from pennyweight.errors import SpecError
from pennyweight.formats import grids
from pennyweight.formats.codebook import Codebook

Specials = Literal["none", "nan", "ieee"]


@dataclass(frozen=True, slots=True)
class Minifloat(Codebook):
    """`(-1)^s 2^(max(e, 1) - bias) ((e > 0) + m / 2^mantissa)`; what is held in `values` are the finite levels.

    encode: nearest, ties to the even mantissa, after clamping to the greatest finite magnitude; the sign of zero is
    kept; NaN -> the lowest level.
    decode: all patterns, infinities and NaN among them.

    Attributes:
        exponent, mantissa, bias: of the format.
        specials: patterns that are no finite numbers: "nan" the greatest of each sign, "ieee" the greatest exponent.
        subnormals: whether exponent 0 counts in steps of the least normal; if not, its numbers are zero and half the
            least normal is where zero ends.
        patterns: the value of every code.
    """

    exponent: int = 4
    mantissa: int = 3
    bias: int = 7
    specials: Specials = "none"
    subnormals: bool = True
    patterns: tuple[float, ...] = field(default=(), repr=False, compare=False)

    def top(self) -> int:
        """The code of the greatest finite number."""
        codes = 1 << (self.exponent + self.mantissa)
        return codes - 1 - {"none": 0, "nan": 1, "ieee": 1 << self.mantissa}[self.specials]

    def encode(self, x: Tensor, zero: Tensor | None = None) -> Tensor:
        """Nearest bit patterns.

        Raises:
            SpecError: on a zero point, which bit patterns have no place for.
        """
        if zero is not None:
            raise SpecError("a float format has no zero point", spec=self.name)
        lost = torch.isnan(x)
        greatest = self.values[-1]
        magnitude = torch.nan_to_num(x.double().abs(), nan=greatest, posinf=greatest).clamp(max=greatest)
        least = 1 - self.bias
        binade = (torch.frexp(magnitude).exponent - 1).clamp(min=least)  # magnitude < 2^(binade + 1)
        binade = torch.where(magnitude == 0, least, binade)
        steps = torch.round(torch.ldexp(magnitude, self.mantissa - binade))  # half to even, exactly
        code = ((binade - least) << self.mantissa) + steps.to(torch.int64)
        if not self.subnormals:
            first = 1 << self.mantissa
            small = torch.where(magnitude > 2.0 ** (least - 1), first, 0)  # a tie goes to zero
            code = torch.where(code < first, small, code)
        sign = (torch.signbit(x) | lost).to(torch.int64) << (self.bits - 1)
        return (code.clamp(max=self.top()) | sign).to(self.dtype)

    def decode(self, codes: Tensor) -> Tensor:
        """Values of bit patterns, float32."""
        return self.table().to(codes.device)[codes.long()]

    def table(self) -> Tensor:
        """The value of every code, float32 [2^bits]."""
        return torch.tensor(self.patterns)


def minifloat(
    name: str,
    exponent: int,
    mantissa: int,
    bias: int,
    specials: Specials = "none",
    *,
    subnormals: bool = True,
) -> Minifloat:
    """The format of these fields.

    Raises:
        SpecError: if a number does not fit float32, or a field has no bits.
    """
    if exponent < 1 or mantissa < 0 or exponent + mantissa > 7:
        raise SpecError(
            f"{exponent} exponent and {mantissa} mantissa bits are no code of 2 to 8 bits", spec=name
        )
    half = 1 << (exponent + mantissa)
    magnitudes = []
    for code in range(half):
        e, m = code >> mantissa, (code & ((1 << mantissa) - 1)) / (1 << mantissa)
        if e == 0:
            value = math.ldexp(m, 1 - bias) if subnormals else 0.0
        else:
            value = math.ldexp(1 + m, e - bias)
        if specials == "nan" and code == half - 1:
            value = math.nan
        if specials == "ieee" and e == (1 << exponent) - 1:
            value = math.nan if m else math.inf
        magnitudes.append(value)
    finite = sorted({v for v in magnitudes if math.isfinite(v)})
    if finite[-1] > 2.0**127 or finite[1] < 2.0**-149:
        raise SpecError("a level lies outside of float32", spec=name)
    patterns = (*magnitudes, *(-v for v in magnitudes))
    unit = next(v for v in finite if v > 0)
    whole = len(finite) == len(patterns) // 2 and finite[-1] / unit <= 127
    whole = whole and all((v / unit).is_integer() for v in finite)
    multiples = tuple(int(v / unit) for v in patterns) if whole else None
    values = (*(-v for v in reversed(finite[1:])), *finite)
    return Minifloat(
        name, exponent + mantissa + 1, values, multiples, unit if whole else 1.0, False, torch.uint8,
        exponent, mantissa, bias, specials, subnormals, patterns,
    )  # fmt: skip


for _format in (
    minifloat("fp8_e4m3", 4, 3, 7, "nan"),
    minifloat("fp8_e5m2", 5, 2, 15, "ieee"),
    minifloat("fp6_e3m2", 3, 2, 3),
    minifloat("fp6_e2m3", 2, 3, 1),
    minifloat("fp4_e2m1", 2, 1, 1),
):
    grids.add(_format.name, _format)

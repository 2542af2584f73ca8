"""Grids of a few levels anywhere: a code is the place of its level in ascending order.

    binary       -1, 1                                     1 bit   Rastegari et al. 2016 (arXiv:1603.05279)
    ternary      -1, 0, 1                                  2 bits  Li et al. 2016 (arXiv:1605.04711)
    seq2, seq3   half-odd: (k + 1/2), no zero              2, 3    Liu et al. 2025, ParetoQ (arXiv:2502.02631), SEQ
    pot3 .. pot5 0, +- 2^0 .. 2^(2 - 2^(b-1))              b bits  Miyashita et al. 2016 (arXiv:1603.01025); also
                 Zhou et al. 2017, INQ (arXiv:1702.03044), section 2.1, divided by 2^n1
    upot2 ..     0, 2^0 .. 2^(2 - 2^b)                     b bits  the same for activations after a ReLU
    sqrt2_3 ..   0, +- sqrt(2)^0 .. sqrt(2)^-(2^(b-1) - 2) b bits  Miyashita et al. 2016, base sqrt(2); to 14 binary
                 places, so that they are multiples of one unit
    apot3 ..     sums of powers of two, divided by the greatest   Li et al. 2020 (arXiv:1909.13144), equation 5
    uapot2 ..    the same without a sign, for activations
    nf4          quantiles of a normal distribution        4 bits  Dettmers et al. 2023 (arXiv:2305.14314), appendix E

encode: the nearest level, ties to the greater one; NaN -> the lowest, infinities -> the extremes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import torch
from torch import Tensor

from pennyweight.formats import grids
from pennyweight.formats.integer import Integer


@dataclass(frozen=True, slots=True)
class Codebook:
    """Levels in ascending order; `codes` are their places, uint8.

    Attributes:
        values: the levels.
        multiples: integers with `level = multiple * unit`, where all of them fit a signed byte: kernels multiply by
            these. None where there are none.
        wide: likewise where they fit two bytes and not one.
        unit: see above.
    """

    name: str
    bits: int
    values: tuple[float, ...]
    multiples: tuple[int, ...] | None = None
    unit: float = 1.0
    affine: bool = False
    dtype: torch.dtype = torch.uint8
    wide: tuple[int, ...] | None = field(default=None, kw_only=True)

    @property
    def has_zero(self) -> bool:
        """Whether 0.0 is a level."""
        return 0.0 in self.values

    def levels(self) -> Tensor:
        """All levels, ascending."""
        return torch.tensor(self.values)

    @property
    def center(self) -> int:
        """The unsigned code of level 0 where a byte holds the multiples."""
        return 128 if min(self.multiples or ()) < 0 else 0

    def rounding(self) -> Tensor:
        """The code of the nearest multiple for every unsigned code, uint8 [256], ties to the greater one.

        Activations on such a grid are first rounded to whole units, as hardware that finds the leading one bit does.
        """
        assert self.multiples is not None
        known = torch.tensor(self.multiples, dtype=torch.int16)
        codes = torch.arange(256, dtype=torch.int16) - self.center
        middles = (known[:-1] + known[1:]).double() / 2
        return (known[torch.bucketize(codes.double(), middles, right=True)] + self.center).to(torch.uint8)

    def encode(self, x: Tensor, zero: Tensor | None = None) -> Tensor:
        """Nearest codes; `zero` has no meaning here and is added to the code as grids of integers do."""
        levels = self.levels().double()
        middles = ((levels[:-1] + levels[1:]) / 2).to(x.device)
        # a middle itself belongs to the level above; NaN compares above all, and is put at the bottom instead
        known = torch.nan_to_num(x.double(), nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        codes = torch.bucketize(known.contiguous(), middles, right=True)
        if zero is not None:
            codes = (codes + zero).clamp(0, len(self.values) - 1)
        return codes.to(self.dtype)

    def decode(self, codes: Tensor) -> Tensor:
        """Levels of codes."""
        return self.levels().to(codes.device)[codes.long()]


def codebook(name: str, bits: int, fractions: Iterable[Fraction]) -> Codebook:
    """A grid of these levels; if they are multiples, up to 2^15 - 1, of one unit, with integers for kernels."""
    ordered = sorted(fractions)
    shared = math.lcm(*(v.denominator for v in ordered))
    whole = [int(v * shared) for v in ordered]
    factor = math.gcd(*whole)
    multiples = tuple(n // factor for n in whole)
    greatest = max(abs(n) for n in multiples)
    if greatest > 32767:
        return _rounded(name, bits, ordered)
    narrow, wide = (multiples, None) if greatest <= 127 else (None, multiples)
    return _rounded(name, bits, ordered, narrow, factor / shared, wide)


def _rounded(
    name: str,
    bits: int,
    values: Sequence[Fraction | float],
    multiples: tuple[int, ...] | None = None,
    unit: float = 1.0,
    wide: tuple[int, ...] | None = None,
) -> Codebook:
    levels = tuple(float(torch.tensor(float(v))) for v in values)  # as float32 has them
    return Codebook(name, bits, levels, multiples, unit, wide=wide)


def _signed(magnitudes: set[Fraction]) -> list[Fraction]:
    return sorted({s * m for m in magnitudes for s in (-1, 1)})


def powers(bits: int) -> set[Fraction]:
    """0 and 2^0 .. 2^-(n - 2), n = 2^bits: what `bits` say of a magnitude, one of them being zero."""
    return {Fraction(0)} | {Fraction(1, 1 << i) for i in range((1 << bits) - 1)}


# terms of APoT by magnitude bits, as negative exponents of two; each term may also be zero
_TERMS: dict[int, tuple[tuple[int, ...], ...]] = {
    2: ((1, 2, 3),),
    3: ((1, 2, 4), (3,)),
    4: ((1, 3, 5), (2, 4, 6)),
    5: ((1, 3, 6), (2, 4, 7), (5,)),
    6: ((1, 4, 7), (2, 5, 8), (3, 6, 9)),
}


def additive_powers(bits: int) -> set[Fraction]:
    """Sums of one power of two, or zero, from each term, divided by the greatest sum."""
    choices = [[Fraction(0), *(Fraction(1, 1 << e) for e in term)] for term in _TERMS[bits]]
    sums = {sum(pick, Fraction(0)) for pick in itertools.product(*choices)}
    return {s / max(sums) for s in sums}


NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def _register() -> None:
    one = Fraction(1)
    books = [codebook("binary", 1, [-one, one])]
    for b in (2, 3):
        books.append(
            codebook(f"seq{b}", b, [Fraction(2 * k + 1, 2) for k in range(-(1 << b) // 2, (1 << b) // 2)])
        )
    for b in (2, 3, 4, 5):
        books.append(codebook(f"upot{b}", b, powers(b)))
        if b > 2:  # of two bits the ternary grid is left
            books.append(codebook(f"pot{b}", b, _signed(powers(b - 1))))
    for b in (3, 4, 5):
        roots = {Fraction(round(2.0 ** (14 - i / 2)), 1 << 14) for i in range((1 << (b - 1)) - 1)}
        books.append(codebook(f"sqrt2_{b}", b, _signed({Fraction(0)} | roots)))
    for b in (2, 3, 4, 5, 6):
        books.append(codebook(f"uapot{b}", b, additive_powers(b)))
        books.append(codebook(f"apot{b + 1}", b + 1, _signed(additive_powers(b))))
    books.append(_rounded("nf4", 4, NF4))
    for book in books:
        grids.add(book.name, book)
    grids.add("ternary", Integer("ternary", 2, -1, 1, torch.int8))


_register()

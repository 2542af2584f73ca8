"""What stored codes mean. A `QuantSpec` is a value: grid, block, zero point, scale format, and nothing else.

How the numbers were found (observer, solver, order) is never part of a spec.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal, cast

from pennyweight.errors import SpecError

ZeroKind = Literal["none", "int", "float"]
ScaleFormat = Literal["fp32", "fp16", "bf16", "e8m0"]  # e8m0: powers of two from 2^-127 to 2^127
SCALE_BITS: dict[str, int] = {"fp32": 32, "fp16": 16, "bf16": 16, "e8m0": 8}
_ZERO_TEXT: dict[str, ZeroKind] = {"": "none", "+z": "int", "+zf": "float"}
_TEXT = re.compile(
    r"(?P<grid>[a-z][a-z0-9_]*)\[(?P<block>[^\]]*)\](?P<zero>\+zf|\+z)?"
    r"(?:\^(?:\((?P<spec>.*)\)|(?P<scale>[a-z0-9]+)))?"
)


@dataclass(frozen=True, slots=True)
class QuantSpec:
    """Decoding contract: `x = (grid[code] - zero) * scale`, one scale per block of elements.

    `block` is aligned to the trailing axes: `block[-i]` elements of axis `-i` share a scale, `None` means the whole
    axis, and every axis in front of the block has one scale per index. `()` is one scale for the whole tensor.

    Text form (it round-trips): `int8[*]` per tensor, `int8n[1,*]` one scale per row, `int4[128]+z` groups of 128 with
    an integer zero point, `int8[4,4]` 2-D blocks, `int4[32]^fp16` half-precision scales, `nf4[64]^(uint8[*])` scales
    that are quantized themselves, `fp4_e2m1[32]^e8m0` MXFP4, `fp4_e2m1[16]^(fp8_e4m3[*])` NVFP4.

    Args:
        grid: name of a registered grid.
        block: see above.
        zero: whether a zero point is stored, as an integer code or as a float.
        scale: format of the stored scales, or the spec that quantizes them.

    Raises:
        SpecError: on a block that is not positive, or one that the text form could not tell from "per tensor".

    >>> QuantSpec.parse("int4[128]+z")
    QuantSpec(grid='int4', block=(128,), zero='int', scale='fp32')
    >>> str(QuantSpec("uint8", (1, None), "int", "fp16"))
    'uint8[1,*]+z^fp16'
    """

    grid: str
    block: tuple[int | None, ...] = ()
    zero: ZeroKind = "none"
    scale: QuantSpec | ScaleFormat = "fp32"

    def __post_init__(self) -> None:
        if self.block == (None,):
            raise SpecError(
                "a block of one whole axis is ambiguous",
                spec=self.grid,
                hint="Write [1,*] for one scale per row, [*] for one scale per tensor.",
            )
        if any(b is not None and b < 1 for b in self.block):
            raise SpecError(f"block {self.block} has a size below 1", spec=self.grid)

    @classmethod
    def parse(cls, text: str) -> QuantSpec:
        """Read the text form.

        Raises:
            SpecError: if `text` is not a spec.
        """
        match = _TEXT.fullmatch(text.replace(" ", ""))
        if match is None:
            raise SpecError(
                f"{text!r} is not a spec", hint="Examples: int8n[1,*]  uint8[*]+z  int4[128]^fp16."
            )
        try:
            block = tuple(None if b == "*" else int(b) for b in match["block"].split(","))
        except ValueError:
            raise SpecError(
                f"block [{match['block']}] of {text!r} is not a list of sizes",
                hint="Sizes or *, as in [1,*].",
            ) from None
        scale: QuantSpec | ScaleFormat = "fp32"
        if match["spec"] is not None:
            scale = cls.parse(match["spec"])
        elif match["scale"] is not None:
            if match["scale"] not in SCALE_BITS:
                raise SpecError(
                    f"scale format {match['scale']!r} of {text!r} is unknown",
                    hint=f"One of {list(SCALE_BITS)}.",
                )
            scale = cast("ScaleFormat", match["scale"])
        return cls(match["grid"], () if block == (None,) else block, _ZERO_TEXT[match["zero"] or ""], scale)

    def __str__(self) -> str:
        block = ",".join("*" if b is None else str(b) for b in self.block) or "*"
        zero = {"none": "", "int": "+z", "float": "+zf"}[self.zero]
        if isinstance(self.scale, QuantSpec):
            return f"{self.grid}[{block}]{zero}^({self.scale})"
        return f"{self.grid}[{block}]{zero}" + ("" if self.scale == "fp32" else f"^{self.scale}")

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the scales of a tensor of this shape: same number of axes, every size divides.

        Raises:
            SpecError: if the block has more axes than the tensor, or does not divide it.

        >>> QuantSpec.parse("int4[1,32]").scale_shape((8, 64))
        (8, 2)
        """
        if not self.block:
            return (1,) * len(shape)
        if len(self.block) > len(shape):
            raise SpecError(
                f"the block has {len(self.block)} axes, the tensor {len(shape)}",
                spec=str(self),
                shapes=str(shape),
                hint="Use [*] for one scale per tensor.",
            )
        front = len(shape) - len(self.block)
        out = list(shape[:front])
        for axis, (size, block) in enumerate(zip(shape[front:], self.block, strict=True)):
            if block is None:
                out.append(1)
            elif size % block:
                divisors = [d for d in range(1, size + 1) if size % d == 0]
                best = min(divisors, key=lambda d: abs(d - block))
                raise SpecError(
                    f"axis {front + axis} of size {size} is not a multiple of the block {block}",
                    spec=str(self),
                    shapes=str(shape),
                    hint=f"The nearest block that divides it is {best}.",
                )
            else:
                out.append(size // block)
        return tuple(out)

    def bits_per_element(self, shape: tuple[int, ...]) -> float:
        """Stored bits per element of a tensor of this shape, scales and zero points included."""
        from pennyweight.formats import grids  # the formats stand on specs; only this estimate looks back

        bits = grids[self.grid].bits
        scales = self.scale_shape(shape)
        elements = max(math.prod(shape), 1)
        if isinstance(self.scale, QuantSpec):
            scale_bits = self.scale.bits_per_element(scales)
        else:
            scale_bits = SCALE_BITS[self.scale]
        zero_bits = {"none": 0, "int": bits, "float": 32}[self.zero]
        return bits + math.prod(scales) * (scale_bits + zero_bits) / elements

    @property
    def per_tensor(self) -> bool:
        """Whether one scale serves the whole tensor."""
        return not self.block

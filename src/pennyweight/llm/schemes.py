"""Schemes: what weights and activations of linear layers become, from a short name.

    w8a8           int8 weights, one scale per row (or group); activations int8 per token, ranged at run time
    w8a8-static    the same, activations calibrated, one scale per tensor
    w4a8           int4 weights in groups, activations int8 per token
    w4a16 .. w2a16 weights alone; also w3, w5, w6
    w4a4           activations int4 per token
    nf4, mxfp4     weights alone, on levels
    q4_k .. q6_k   weights alone, as llama.cpp's files of these names have them: groups whose scales have 6 or 8 bits

A spec text such as `int4[32]^fp16` is a scheme too, weights alone; `int4[32]^fp16/uint8[1,*]+z` says the activations.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from pennyweight.errors import InputError, SpecError, nearest
from pennyweight.formats import grids
from pennyweight.formats.integer import Integer
from pennyweight.plan import LayerPlan
from pennyweight.spec import QuantSpec

NAMES = ("w8a8", "w8a8-static", "w8a16", "w6a16", "w5a16", "w4a8", "w4a16", "w4a4", "w3a8", "w3a16", "w2a8", "w2a16",
         "nf4", "mxfp4", "q4_k", "q5_k", "q6_k")  # fmt: skip
K_SPECS = {"q4_k": "uint4[32]+zf^(uint6[8]^fp16)", "q5_k": "uint5[32]+zf^(uint6[8]^fp16)",
           "q6_k": "int6[16]^(int8[16]^fp16)"}  # fmt: skip
_NAME = re.compile(r"w([2345678])a(4|8|16)(-static)?")


@dataclass(frozen=True, slots=True)
class Scheme:
    """Specs of a linear layer.

    Attributes:
        weight: of the weight [out, in].
        input: of the activations; None leaves them in float.
        static: whether activations are calibrated rather than ranged at run time.
    """

    weight: QuantSpec
    input: QuantSpec | None = None
    static: bool = False

    def __str__(self) -> str:
        if self.input is None:
            return str(self.weight)
        return f"{self.weight}/{self.input}" + ("!" if self.static else "")

    def layer(self, name: str) -> LayerPlan:
        """The plan of one linear layer."""
        inputs = {} if self.input is None else {0: self.input}
        return LayerPlan(name, "Linear", self.weight, inputs, dynamic=bool(inputs) and not self.static)

    @classmethod
    def parse(cls, text: str) -> Scheme:
        """The inverse of `str`.

        Raises:
            SpecError: on texts that are no specs.
        """
        weight, _, rest = text.partition("/")
        static = rest.endswith("!")
        inputs = QuantSpec.parse(rest.rstrip("!")) if rest else None
        return cls(_known(QuantSpec.parse(weight)), inputs and _known(inputs), static)


def _known(spec: QuantSpec) -> QuantSpec:
    if spec.grid not in grids:
        raise SpecError(
            f"there is no grid {spec.grid!r}", spec=str(spec), hint=nearest(spec.grid, grids, "grids")
        )
    return spec


def scheme_of(name: str, group: int | None = None, *, asymmetric: bool = False) -> Scheme:
    """The scheme of a name.

    Args:
        name: see the module.
        group: inputs that share a scale; 0 for whole rows. 32 for fewer than 8 bits where nothing is said.
        asymmetric: give weights a zero point.

    Raises:
        InputError: on an unknown name, or options that do not go together.
    """
    if "[" in name:
        return Scheme.parse(name)
    if name in K_SPECS:
        if asymmetric or group not in (None, 0, QuantSpec.parse(K_SPECS[name]).block[-1]):
            raise InputError(
                f"{name} says its groups and minima itself", hint="Leave --group and --asymmetric out."
            )
        return Scheme(QuantSpec.parse(K_SPECS[name]))
    if name in ("nf4", "mxfp4"):
        if asymmetric:
            raise InputError(f"{name} has no zero point", hint="Leave --asymmetric out.")
        if name == "mxfp4":
            return Scheme(QuantSpec("fp4_e2m1", (32,), scale="e8m0"))
        return Scheme(QuantSpec("nf4", (group or 64,), scale="fp16"))
    match = _NAME.fullmatch(name)
    if match is None:
        raise InputError(f"there is no scheme {name!r}", hint=nearest(name, NAMES, "schemes"))
    bits, tokens, static = int(match[1]), int(match[2]), bool(match[3])
    size = (0 if bits == 8 else 32) if group is None else group
    if size < 0:
        raise InputError(f"a group of {size}", hint="32, 64 or 128; 0 for whole rows.")
    if asymmetric and tokens < 16:
        raise InputError(
            "weights that meet integer activations have no zero point", spec=name,
            hint=f"Use w{bits}a16, or leave --asymmetric out.",
        )  # fmt: skip
    grid = f"uint{bits}" if asymmetric else f"int{bits}n" if bits == 8 else f"int{bits}"
    weight = QuantSpec(grid, (size,) if size else (1, None), "int" if asymmetric else "none",
                       "fp16" if size else "fp32")  # fmt: skip
    if static:
        if tokens != 8 or size:
            raise InputError(
                f"{name}: calibrated activations go with rows of int8", hint="w8a8-static, --group 0."
            )
        return Scheme(weight, QuantSpec("uint8", (), "int"), static=True)
    return Scheme(weight, None if tokens == 16 else QuantSpec(f"uint{tokens}", (1, None), "int"))


def bits_of(spec: QuantSpec) -> int:
    """Bits of a code."""
    return grids[spec.grid].bits


def is_integer(spec: QuantSpec) -> bool:
    """Whether codes are consecutive integers."""
    return isinstance(grids[spec.grid], Integer)

"""From the specs of annotations to `QuantSpec`s.

Specs are read by the names of their fields and classes, so that annotations made with the classes of other packages of
this interface work too.
"""

from __future__ import annotations

import functools
import math
from typing import Any, Literal

import torch

from pennyweight.errors import UnrealisableSite
from pennyweight.formats import grids
from pennyweight.formats.integer import Integer
from pennyweight.spec import QuantSpec

_HALVES: dict[torch.dtype, Literal["float16", "bfloat16"]] = {
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}
_LIMITS = {
    "int8": (-128, 127), "qint8": (-128, 127), "uint8": (0, 255), "quint8": (0, 255), "int16": (-32768, 32767),
    "uint16": (0, 65535), "int4": (-8, 7), "uint4": (0, 15), "quint4x2": (0, 15), "int2": (-2, 1), "uint2": (0, 3),
}  # fmt: skip
_RANGES = (  # part of an observer's name, the range rule that does what it does
    ("Histogram", "mse"), ("MovingAveragePerChannel", "minmax"), ("MovingAverage", "moving_minmax"),
    ("FusedMovingAvg", "moving_minmax"), ("MinMax", "minmax"),
)  # fmt: skip


def is_half(spec: Any) -> bool:
    """Whether a spec asks for a 16-bit float."""
    return spec.dtype in _HALVES


def half_name(spec: Any) -> Literal["float16", "bfloat16"]:
    """The name of that float."""
    return _HALVES[spec.dtype]


def range_of(spec: Any) -> str:
    """The range rule that does what the spec's observer does; of fake-quantizers, what theirs does."""
    name = observer_name(getattr(spec, "observer_or_fake_quant_ctr", None))
    return next((rule for part, rule in _RANGES if part in name), "minmax")


def observer_name(constructor: Any) -> str:
    """The class name of what a constructor makes: through partials, and through fake-quantizers to their observers."""
    constructor = getattr(constructor, "p", constructor)  # what `with_args` wraps around a partial
    if isinstance(constructor, functools.partial):
        inner = constructor.keywords.get("observer")
        return observer_name(constructor.func if inner is None else inner)
    return str(getattr(constructor, "__name__", ""))


def limits(spec: Any, site: str) -> tuple[int, int] | None:
    """Least and greatest code; None for floats.

    Raises:
        UnrealisableSite: for a dtype that is no integer and no common float.
    """
    if spec.dtype in (torch.float32, torch.float64, *_HALVES):
        return None
    name = str(spec.dtype).removeprefix("torch.")
    low, high = spec.quant_min, spec.quant_max
    if name not in _LIMITS and name != "int32":
        raise UnrealisableSite(
            f"nothing runs on {name} codes",
            site=site,
            hint="torch.int8 or torch.uint8, with quant_min and quant_max.",
        )
    ends = _LIMITS.get(name, (-(2**31), 2**31 - 1))
    return (ends[0] if low is None else int(low)), (ends[1] if high is None else int(high))


def activation_spec(spec: Any, site: str) -> tuple[QuantSpec, bool] | None:
    """The spec of an activation, and whether it is ranged at run time; None for one that stays in float.

    Activations take the whole of their grid: a range reduced to 7 bits, which is there for kernels that saturate, is
    widened to 8. Symmetric codes of an unsigned type are signed ones.

    Raises:
        UnrealisableSite: if there is no such grid, or it has scales by channel without being ranged at run time.
    """
    ends = None if spec is None else limits(spec, site)
    if ends is None:
        return None
    low, high = ends
    bits = math.ceil(math.log2(high - low + 1))
    bits = 8 if bits == 7 else bits
    scheme = getattr(spec, "qscheme", None)
    symmetric = scheme in (torch.per_tensor_symmetric, torch.per_channel_symmetric)
    dynamic = bool(getattr(spec, "is_dynamic", False))
    if dynamic:
        rows = scheme in (torch.per_channel_affine, torch.per_channel_symmetric)
        return QuantSpec("uint8", (1, None) if rows else (), "int"), True
    if scheme in (torch.per_channel_affine, torch.per_channel_symmetric):
        raise UnrealisableSite(
            "calibrated activations need one scale per tensor", site=site, spec=str(scheme),
            hint="Use torch.per_tensor_affine, or is_dynamic=True.",
        )  # fmt: skip
    grid = f"int{bits}" if low < 0 or symmetric else f"uint{bits}"
    _known(grid, ends, site)
    return QuantSpec(grid, (), "none" if symmetric else "int"), False


def weight_spec(spec: Any, site: str, axis: int) -> QuantSpec | None:
    """The spec of a weight on its matrix view; None for one that stays in float. `axis` is that of the outputs.

    Raises:
        UnrealisableSite: if there is no such grid, or its scales are along another axis.
    """
    ends = None if spec is None else limits(spec, site)
    if ends is None:
        return None
    low, high = ends
    scheme = getattr(spec, "qscheme", None) or torch.per_tensor_symmetric
    symmetric = scheme in (torch.per_tensor_symmetric, torch.per_channel_symmetric)
    by_row = scheme not in (torch.per_tensor_symmetric, torch.per_tensor_affine)
    if by_row and getattr(spec, "ch_axis", None) not in (None, axis):
        raise UnrealisableSite(
            f"scales of a weight go along its outputs, axis {axis}", site=f"{site}:weight",
            spec=f"ch_axis={spec.ch_axis}", hint=f"Use ch_axis={axis}.",
        )  # fmt: skip
    if symmetric and low >= 0:
        half = (high - low + 1) // 2
        low, high = -half, half - 1
    found = [n for n, g in grids.items() if isinstance(g, Integer) and (g.qmin, g.qmax) == (low, high)]
    grid = found[0] if found else f"codes {low} .. {high}"
    _known(grid, (low, high), f"{site}:weight")
    floating = scheme == torch.per_channel_affine_float_qparams
    zero: Literal["none", "int", "float"] = "none" if symmetric else "float" if floating else "int"
    return QuantSpec(grid, (1, None) if by_row else (), zero)


def _known(grid: str, ends: tuple[int, int], site: str) -> None:
    if grid not in grids:
        known = sorted((g.qmin, g.qmax) for g in grids.values() if isinstance(g, Integer))
        raise UnrealisableSite(
            f"there is no grid of codes {ends[0]} .. {ends[1]}", site=site,
            hint="There are " + ", ".join(f"{a} .. {b}" for a, b in known) + ".",
        )  # fmt: skip

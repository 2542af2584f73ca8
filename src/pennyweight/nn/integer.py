"""What every converted module with a weight holds: codes, scales, and how activations are ranged."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from pennyweight.errors import UnrealisableSite
from pennyweight.formats import grids
from pennyweight.formats.codebook import Codebook
from pennyweight.formats.integer import Integer
from pennyweight.nn.fake import ActivationQuantizer
from pennyweight.nn.packing import by_row, code_bits, pack_codes, tabled, weight_codes
from pennyweight.plan import LayerPlan
from pennyweight.qtensor import QTensor
from pennyweight.spec import QuantSpec

INT32_MAX = 2**31 - 1


class IntegerWeight(nn.Module):
    """Buffers of a converted layer; subclasses add the call.

    codes: int8 [out, in] (the matrix view), or packed uint8 [out, ceil(in / 2)] for weights of at most 4 bits that
    meet float activations or, in linear layers, activations ranged at run time (low nibble first, two's complement;
    there a row without groups is one group), or packed uint8 [out, ceil(in / 8)] where weights and activations are
    binary (`pack_signs`). Where activations are integers too and the grid has at most 16 levels:
    uint8 [out, ceil(in * b / 8)] of b = 1, 2 or 4 bits, which name entries of `table`, int8 [2^b], or [out, 2^b] where
    rows have zero points (else None); levels that need more than 8 bits likewise, the table int16 and b up to 8.
    scale: float32 [out] or [1] where activations are integers and codes are not in groups, [out or 1, groups]
    otherwise. zero: float32, like scale, or None; where activations are integers None, as codes or table are less their
    zero points. x_scale, x_zero: 0-d float32.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    table: Tensor | None
    x_scale: Tensor
    x_zero: Tensor
    x_levels: Tensor | None
    bias: Tensor | None

    def __init__(self, layer: LayerPlan, q: QTensor, shape: tuple[int, ...]) -> None:
        super().__init__()
        kind = layer.kind.lower()
        stored = tabled(q) if kind.startswith(("linear", "conv")) else None
        signs = q.spec.grid == "binary" and 0 in layer.inputs and layer.inputs[0].grid == "binary"
        levels, q = q, in_multiples(q, layer.name, wide=stored is not None and bool(layer.inputs))
        grid = grids[q.spec.grid]
        self.layer, self.shape = layer, tuple(shape)
        self.out_features, self.in_features = q.codes.shape
        self.mode: Literal["static", "dynamic", "grouped", "binary", "weight"] = "weight"
        if signs:
            self.mode = "binary"
        elif layer.inputs:
            self.mode = "dynamic" if layer.dynamic else "static"
        self.x_high = 255
        self.per_token = bool(layer.inputs) and not layer.inputs[0].per_tensor
        # a row without groups is one group: two codes to a byte
        packed = 2 < grid.bits <= 4 and kind == "linear"
        if self.mode == "dynamic" and (packed or q.scales().shape[1] > 1):
            self.mode = "grouped"
            _refuse_unfit_groups(layer, q)
        self.bits = 4 if grid.bits <= 4 and self.mode in ("weight", "grouped") else 8
        if grid.bits > 8:
            _refuse_unfit_sums(layer, levels, q)
        integral = self.mode in ("static", "dynamic", "binary")
        if integral:
            q = less_zero(q)
            _refuse_unfit(layer, q)
        codes, rows = q.codes, len(q.codes)
        scale, zero = by_row(q.scales(), rows), None if q.zero is None else by_row(q.zero.float(), rows)
        if integral:
            scale = scale.reshape(-1)
        if codes.dtype == torch.uint8:  # one signed storage for all: shift codes and zero point together
            shift = 1 << (grid.bits - 1)
            codes = (codes.to(torch.int16) - shift).to(torch.int8)
            zero = torch.full_like(scale, float(-shift)) if zero is None else zero - shift
        if self.mode == "binary":
            codes, self.bits = pack_signs(levels.codes > 0), 1
        table = None
        if stored is not None and self.mode in ("static", "dynamic"):
            places, table = stored
            codes = pack_codes(places, code_bits(table))
        self.register_buffer("codes", pack_nibbles(codes) if self.bits == 4 else codes.contiguous())
        self.register_buffer("table", table)
        self.register_buffer("scale", scale.contiguous())
        self.register_buffer("zero", zero)
        self.register_buffer("x_scale", torch.tensor(float("nan")))
        self.register_buffer("x_zero", torch.tensor(float("nan")))
        self.register_buffer("x_levels", None)

    def calibrated(self, quantizer: ActivationQuantizer) -> None:
        """Take the activation's parameters, shifted to unsigned codes (`docs/numerics.md`, activations)."""
        if self.mode == "binary":
            self.x_scale, self.x_zero = quantizer.scale.clone(), torch.zeros_like(quantizer.scale)
            return
        grid = grids[quantizer.spec.grid]
        if isinstance(grid, Codebook) and grid.multiples is not None:
            self.x_scale = quantizer.scale * grid.unit
            self.x_zero = torch.full_like(self.x_scale, float(grid.center))
            self.x_levels = grid.rounding().to(self.x_scale.device)
            return
        self.x_scale, self.x_zero = unsigned_params(quantizer)
        self.x_high = greatest_code(quantizer.spec)

    def integer_bias(self, bias: Tensor | None) -> Tensor | None:
        """See `bias_codes`; for a layer that is `calibrated`."""
        sums = None
        if self.table is not None and self.table.dtype == torch.int16:
            sums = worst_sums(weight_codes(self.codes, self.table, self.in_features))
        return bias_codes(bias, self.x_scale, self.scale, sums)

    def extra_repr(self) -> str:
        """Scheme, for printing."""
        weight = self.layer.weight
        inputs = ", ".join(str(s) for s in self.layer.inputs.values())
        return f"{self.mode}, weight={weight}, input={inputs or 'float'}, shape={self.shape}"


def in_multiples(q: QTensor, site: str, *, wide: bool = False) -> QTensor:
    """The same weight on a grid of integers: levels that are multiples of a unit become these multiples, `int8`.

    wide: multiples of two bytes may be, as `int16`.

    Raises:
        UnrealisableSite: if the levels are no multiples of one unit that fit a byte, or two.
    """
    grid = grids[q.spec.grid]
    if isinstance(grid, Integer) and grid.bits <= 8:
        return q
    if wide and isinstance(grid, Codebook) and grid.wide is not None:
        table = torch.tensor(grid.wide, dtype=torch.int16, device=q.codes.device)
        spec = replace(q.spec, grid="int16", scale="fp32")
        return QTensor(table[q.codes.long()], q.scales() * grid.unit, None, spec)
    if not isinstance(grid, Codebook) or grid.multiples is None:
        raise UnrealisableSite(
            "converted weights are integers of at most 8 bits, or levels that are multiples of one unit",
            site=site,
            spec=str(q.spec),
            hint=f"Grids with such levels: {_with_levels('multiples')}. In linear layers and convolutions that meet "
            f"integers also {_with_levels('wide')}.",
        )
    table = torch.tensor(grid.multiples, dtype=torch.int8, device=q.codes.device)
    spec = replace(q.spec, grid="int8", scale="fp32")
    return QTensor(table[q.codes.long()], q.scales() * grid.unit, None, spec)


def less_zero(q: QTensor) -> QTensor:
    """The same weight on signed codes without zero points, `q - z`, where they fit -127 .. 127; as it is elsewhere.

    They do on grids of at most 7 bits: `|q - z| <= 2^bits - 1`.
    """
    if q.scales().shape[1] != 1 or q.spec.zero == "float" or not _offset(q):
        return q
    codes = q.codes.to(torch.int16)
    if q.zero is not None:
        codes = codes - by_row(q.zero, len(codes)).to(torch.int16)
    if codes.numel() and int(codes.abs().max()) > 127:
        return q
    spec = replace(q.spec, grid="int8", zero="none", scale="fp32")
    return QTensor(codes.to(torch.int8), q.scales(), None, spec)


def unsigned_params(quantizer: ActivationQuantizer) -> tuple[Tensor, Tensor]:
    """Scale and zero point of an activation as the kernels want it: codes 0 .. 2^bits - 1.

    Raises:
        UnrealisableSite: if the activation has a grid of more than 8 bits, a narrow one or no integer grid.
    """
    grid = grids[quantizer.spec.grid]
    full = isinstance(grid, Integer) and grid.bits <= 8 and grid.qmax - grid.qmin == (1 << grid.bits) - 1
    if not isinstance(grid, Integer) or not full:
        raise UnrealisableSite(
            "integer kernels take activations on full-range integers of at most 8 bits",
            site=quantizer.site,
            spec=str(quantizer.spec),
            hint="Use uint8[*]+z.",
        )
    shift = -grid.qmin
    return quantizer.scale.clone(), quantizer.zero + shift


def greatest_code(spec: QuantSpec) -> int:
    """Of an activation, counted from 0."""
    return (1 << int(grids[spec.grid].bits)) - 1


def clamped(x: Tensor, scale: Tensor, zero: Tensor, high: int, levels: Tensor | None = None) -> Tensor:
    """Rounded to codes 0 .. high where that is less than a byte holds; the 8-bit ops then find these codes again.

    With `levels`, uint8 [256], codes become what these say: activations on powers of two and their like.
    """
    if high == 255 and levels is None:
        return x
    y: Tensor = torch.ops.pennyweight.round_to_codes(x, scale, zero, high, levels)
    return y


def _with_levels(kind: str) -> list[str]:
    return sorted(n for n, g in grids.items() if getattr(g, kind, None))


def worst_sums(codes: Tensor) -> Tensor:
    """`255 sum |w|` of every row, [out]: what integer products can reach, as activations are unsigned bytes."""
    return 255 * codes.to(torch.int64).abs().sum(1)


def _refuse_unfit_sums(layer: LayerPlan, levels: QTensor, q: QTensor) -> None:
    if q.scales().shape[1] != 1:
        raise UnrealisableSite(
            "levels of more than 8 bits have a scale per row or tensor where activations are integers",
            site=layer.name,
            spec=str(levels.spec),
            hint=f"Use {levels.spec.grid}[1,*], or a grid whose levels fit a byte: {_with_levels('multiples')}.",
        )
    worst = int(worst_sums(q.codes).max()) if q.codes.numel() else 0
    if worst > INT32_MAX:
        raise UnrealisableSite(
            f"sums of {q.codes.shape[1]} products can reach {worst}, beyond int32",
            site=layer.name,
            spec=str(levels.spec),
            shapes=str(tuple(q.codes.shape)),
            hint=f"Use a grid whose levels fit a byte: {_with_levels('multiples')}.",
        )


def refuse_unfit_spec(layer: LayerPlan) -> None:
    """Tell before calibration what the weight of a layer cannot be, whatever its codes.

    Raises:
        UnrealisableSite: if conversion would refuse it.
    """
    spec, kind = layer.weight, layer.kind.lower()
    if spec is None or not layer.inputs or not kind.startswith(("linear", "conv")):
        return
    bits, groups = grids[spec.grid].bits, spec.block[-1:] not in ((), (None,))
    if layer.dynamic and (groups or (kind == "linear" and 2 < bits <= 4)):
        if spec.zero != "none" or kind != "linear":
            raise _unfit_groups(layer, spec)
    elif groups or spec.zero == "float" or (spec.zero == "int" and bits > 7):
        raise _unfit(layer, spec)


def _refuse_unfit(layer: LayerPlan, q: QTensor) -> None:
    if _offset(q) or q.scales().shape[1] != 1:
        raise _unfit(layer, q.spec)


def _refuse_unfit_groups(layer: LayerPlan, q: QTensor) -> None:
    if _offset(q) or layer.kind not in ("Linear", "linear"):
        raise _unfit_groups(layer, q.spec)


def _unfit(layer: LayerPlan, spec: QuantSpec) -> UnrealisableSite:
    return UnrealisableSite(
        "with integer activations a weight has signed codes, up to 127 once zero points are taken off, and a scale per "
        "row or tensor",
        site=layer.name,
        spec=str(spec),
        hint="Use int8n[1,*], zero points up to 7 bits, or leave the activations in float for groups.",
    )


def _unfit_groups(layer: LayerPlan, spec: QuantSpec) -> UnrealisableSite:
    return UnrealisableSite(
        "groups meet integer activations in linear layers, on signed codes without zero points",
        site=layer.name,
        spec=str(spec),
        hint="Use int4[32] there and int8n[1,*] elsewhere.",
    )


def _offset(q: QTensor) -> bool:
    """Whether code 0 of the signed storage would not stand for zero."""
    return q.zero is not None or q.codes.dtype == torch.uint8


def bias_codes(
    bias: Tensor | None, x_scale: Tensor, w_scale: Tensor, sums: Tensor | None = None
) -> Tensor | None:
    """int32 bias at scale `x_scale * w_scale`: `rint(b / (sx * sw))`, computed in float64. Shapes: [out].

    Where a code would leave no room for the products in int32 (a channel whose weights are almost zero), the float
    bias itself is returned, to be added after the product. sums: what products can reach, [out]; half of int32 at most
    where it is not known.
    """
    if bias is None:
        return None
    codes = torch.round(bias.double() / (x_scale.double() * w_scale.double()))
    room: int | Tensor = INT32_MAX // 2 if sums is None else INT32_MAX - sums.double()
    if bool((codes.abs() > room).any()):
        return bias.float()
    return codes.to(torch.int32)


def pack_signs(positive: Tensor) -> Tensor:
    """Truth values [rows, n] to uint8 [rows, ceil(n / 8)], the first in the lowest bit, unused bits 0."""
    rows, n = positive.shape
    padded = torch.nn.functional.pad(positive.to(torch.int32), (0, -n % 8)).reshape(rows, -1, 8)
    return (padded << torch.arange(8, device=positive.device)).sum(-1).to(torch.uint8)


def unpack_signs(packed: Tensor, n: int) -> Tensor:
    """Bits [rows, ceil(n / 8)] to -1.0 and 1.0, float32 [rows, n]."""
    bits = (packed.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=packed.device)) & 1
    return bits.reshape(packed.shape[0], -1)[:, :n].float() * 2.0 - 1.0


def pack_nibbles(codes: Tensor) -> Tensor:
    """int8 codes [rows, n] in -8 .. 7 to uint8 [rows, ceil(n / 2)], low nibble first."""
    if codes.shape[1] % 2:
        codes = torch.cat([codes, codes.new_zeros(codes.shape[0], 1)], 1)
    nibbles = (codes.to(torch.int16) & 15).to(torch.uint8)
    return (nibbles[:, ::2] | (nibbles[:, 1::2] << 4)).contiguous()


def unpack_nibbles(packed: Tensor, n: int) -> Tensor:
    """The inverse of `pack_nibbles`."""
    pairs = torch.stack([packed & 15, packed >> 4], -1).reshape(packed.shape[0], -1)[:, :n]
    return ((pairs.to(torch.int16) ^ 8) - 8).to(torch.int8)

"""Quantized weights as plain tensors with names, and back: codes as dense bits, scales, zero points.

    <layer>.weight.codes   uint8 [out, ceil(in * bits / 8)]: codes less the least, `bits` bits each, the first lowest
    <layer>.weight.scale   as the spec says; [out, groups]     (a scale that is quantized: .codes and .scale again)
    <layer>.weight.zero    float32, where the spec has zero points
    <layer>.input          float32 [2], scale and zero point of calibrated activations

The metadata key `schemes` maps each layer to the text of its scheme, its shape, and where its inputs are turned the
size of the Hadamard matrices, see `online`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pennyweight.errors import FormatError
from pennyweight.formats import grids
from pennyweight.formats.integer import Integer
from pennyweight.llm.schemes import Scheme
from pennyweight.qtensor import QTensor
from pennyweight.spec import QuantSpec


@dataclass(frozen=True)
class Solved:
    """One quantized linear layer or table.

    Attributes:
        scheme: of the layer.
        weight: its codes.
        input: scale and zero point of calibrated activations, float32 [2].
        hadamard: size of the blocks by which its inputs are turned, 0 if they are not; see `online`.
    """

    scheme: Scheme
    weight: QTensor
    input: Tensor | None = None
    hadamard: int = 0


def least(spec: QuantSpec) -> int:
    """The least code of a grid, stored as 0."""
    grid = grids[spec.grid]
    return grid.qmin if isinstance(grid, Integer) else 0


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Codes 0 .. 2^bits - 1, [rows, n], to uint8 [rows, ceil(n * bits / 8)], the first in the lowest bits."""
    flat = codes.contiguous().numpy().astype(np.uint8)
    planes = np.unpackbits(flat[..., None], axis=-1, bitorder="little", count=bits)
    return torch.from_numpy(np.packbits(planes.reshape(len(flat), -1), axis=-1, bitorder="little"))


def unpack_bits(packed: Tensor, bits: int, n: int) -> Tensor:
    """The inverse of `pack_bits`, uint8 [rows, n]."""
    rows = packed.contiguous().numpy()
    planes = np.unpackbits(rows, axis=-1, bitorder="little", count=n * bits).reshape(len(rows), n, bits)
    return torch.from_numpy(np.packbits(planes, axis=-1, bitorder="little")[..., 0].copy())


def to_tensors(name: str, q: QTensor) -> dict[str, Tensor]:
    """Tensors of a quantized matrix called `name`."""
    bits = grids[q.spec.grid].bits
    codes = q.codes.to(torch.int16) - least(q.spec)
    found = {f"{name}.codes": pack_bits(codes, bits)}
    if isinstance(q.scale, QTensor):
        found |= to_tensors(f"{name}.scale", q.scale)
    else:
        scale = q.scale
        found[f"{name}.scale"] = scale.view(torch.uint8) if scale.dtype == torch.float8_e8m0fnu else scale
    if q.zero is not None:
        found[f"{name}.zero"] = q.zero.float()
    return {k: v.contiguous() for k, v in found.items()}


def from_tensors(name: str, spec: QuantSpec, shape: tuple[int, ...], tensors: dict[str, Tensor]) -> QTensor:
    """The inverse of `to_tensors`.

    Raises:
        FormatError: if a tensor is missing, or does not fit.
    """
    grid = grids[spec.grid]
    packed = _get(tensors, f"{name}.codes")
    if tuple(packed.shape) != (shape[0], -(-shape[1] * grid.bits // 8)) or packed.dtype != torch.uint8:
        raise FormatError(
            "codes do not fit", site=name, spec=str(spec), shapes=f"{tuple(packed.shape)} for {shape}"
        )
    codes = (unpack_bits(packed, grid.bits, shape[1]).to(torch.int16) + least(spec)).to(grid.dtype)
    scale: Tensor | QTensor
    if isinstance(spec.scale, QuantSpec):
        scale = from_tensors(f"{name}.scale", spec.scale, spec.scale_shape(shape), tensors)
    else:
        scale = _get(tensors, f"{name}.scale")
        scale = scale.view(torch.float8_e8m0fnu) if spec.scale == "e8m0" else scale
    zero = None if spec.zero == "none" else _get(tensors, f"{name}.zero")
    return QTensor(codes, scale, zero, spec)


def _get(tensors: dict[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise FormatError(f"tensor {name!r} is missing")
    return tensors[name]


def pack(layers: dict[str, Solved]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors of some layers, and the entry of the metadata that describes them."""
    tensors: dict[str, Tensor] = {}
    schemes: dict[str, Any] = {}
    for name, layer in layers.items():
        tensors |= to_tensors(f"{name}.weight", layer.weight)
        if layer.input is not None:
            tensors[f"{name}.input"] = layer.input
        schemes[name] = [str(layer.scheme), list(layer.weight.codes.shape)]
        schemes[name] += [layer.hadamard] if layer.hadamard else []
    return tensors, schemes


def unpack(tensors: dict[str, Tensor], schemes: dict[str, Any]) -> dict[str, Solved]:
    """The inverse of `pack`; other tensors are left alone.

    Raises:
        FormatError: on tensors that are missing or do not fit.
        SpecError: on schemes that are none.
    """
    found = {}
    for name, entry in schemes.items():
        if not (isinstance(entry, list) and len(entry) in (2, 3) and isinstance(entry[0], str)):
            raise FormatError("a scheme is no [text, shape] or [text, shape, size]", site=name)
        scheme = Scheme.parse(entry[0])
        shape = tuple(int(n) for n in entry[1])
        q = from_tensors(f"{name}.weight", scheme.weight, shape, tensors)
        size = entry[2] if len(entry) == 3 else 0
        if type(size) is not int or size < 0 or size & (size - 1) or (size and shape[1] % size):
            raise FormatError(f"inputs cannot be turned in blocks of {size}", site=name, shapes=str(shape))
        found[name] = Solved(scheme, q, _get(tensors, f"{name}.input") if scheme.static else None, size)
    return found

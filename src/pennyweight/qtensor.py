"""The one quantized value, and the one broadcast that knows about blocks.

`QTensor.codes` has the shape of the tensor, `QTensor.scale` the same number of axes, and every scale size divides the
tensor's: per tensor, per channel, per group and 2-D blocks are shapes, not cases.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pennyweight.errors import SpecError
from pennyweight.formats import grids
from pennyweight.spec import QuantSpec

_SCALE_DTYPE = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "e8m0": torch.float8_e8m0fnu,
}


@dataclass(frozen=True, slots=True)
class QParams:
    """Scales and zero points that a range rule found. Shapes: both `spec.scale_shape(x.shape)`; zero may be absent."""

    scale: Tensor
    zero: Tensor | None = None


@dataclass(frozen=True, slots=True)
class QTensor:
    """Codes with their meaning: `x = (grid[codes] - zero) * scale`.

    Shapes: codes as the tensor; scale and zero `spec.scale_shape(codes.shape)`. A quantized scale is a `QTensor` again.
    """

    codes: Tensor
    scale: Tensor | QTensor
    zero: Tensor | None
    spec: QuantSpec

    def __post_init__(self) -> None:
        want = self.spec.scale_shape(tuple(self.codes.shape))
        scale = self.scale.codes if isinstance(self.scale, QTensor) else self.scale
        if tuple(scale.shape) != want:
            raise SpecError(
                "scales do not fit the codes",
                spec=str(self.spec),
                shapes=f"codes {tuple(self.codes.shape)}, scale {tuple(scale.shape)}, wanted {want}",
            )

    def scales(self) -> Tensor:
        """The scales as float32."""
        if isinstance(self.scale, QTensor):
            return self.scale.dequantize()
        return self.scale.float()

    def dequantize(self) -> Tensor:
        """The real values, float32: `(grid[codes] - zero) * scale`."""
        values = grids[self.spec.grid].decode(self.codes)
        shape = values.shape
        scale = self.scales()
        values = blocked(values, tuple(scale.shape))
        if self.zero is not None:
            values = values - unblocked_param(self.zero.float(), tuple(shape))
        return (values * unblocked_param(scale, tuple(shape))).reshape(shape)

    def take(self, rows: Tensor) -> QTensor | None:
        """The rows of these numbers, [n], as a tensor of its own; None where scales span some rows, not all.

        Raises:
            IndexError: if there is no such row.
        """
        block = self.spec.block
        each = bool(block) and (len(block) < self.codes.ndim or block[0] == 1)
        if not each and block and block[0] is not None:
            return None
        scale, zero = self.scale, self.zero
        if each:
            taken = scale.take(rows) if isinstance(scale, QTensor) else scale.index_select(0, rows)
            if taken is None:
                return None
            scale, zero = taken, None if zero is None else zero.index_select(0, rows)
        return QTensor(self.codes.index_select(0, rows), scale, zero, self.spec)

    @property
    def nbytes(self) -> int:
        """Bytes of codes (packed at the grid's bit width), scales and zero points."""
        bits = grids[self.spec.grid].bits
        total = (self.codes.numel() * bits + 7) // 8
        if isinstance(self.scale, QTensor):
            total += self.scale.nbytes
        else:
            total += self.scale.numel() * self.scale.element_size()
        if self.zero is not None:
            zero_bits = bits if self.spec.zero == "int" else 32
            total += (self.zero.numel() * zero_bits + 7) // 8
        return total


def blocked(x: Tensor, scale_shape: tuple[int, ...]) -> Tensor:
    """View `x` [n0*b0, n1*b1, ...] as [n0, b0, n1, b1, ...] where `scale_shape` is [n0, n1, ...].

    Raises:
        SpecError: if a size is not a multiple of the number of blocks along it.
    """
    shape: list[int] = []
    if len(scale_shape) != x.ndim:
        raise SpecError("scales and tensor have different ranks", shapes=f"{tuple(x.shape)}, {scale_shape}")
    for size, blocks in zip(x.shape, scale_shape, strict=True):
        if size and (blocks == 0 or size % blocks):
            raise SpecError(
                f"{blocks} blocks do not divide {size}", shapes=f"{tuple(x.shape)}, {scale_shape}"
            )
        shape += [blocks, size // blocks if blocks else 0]
    return x.reshape(shape)


def unblocked_param(param: Tensor, shape: tuple[int, ...]) -> Tensor:
    """View scales [n0, n1, ...] as [n0, 1, n1, 1, ...], to broadcast over `blocked(x, scales.shape)`."""
    if len(shape) != param.ndim:
        raise SpecError("scales and tensor have different ranks", shapes=f"{shape}, {tuple(param.shape)}")
    return param.reshape([n for size in param.shape for n in (size, 1)])


def per_block(x: Tensor, scale_shape: tuple[int, ...]) -> Tensor:
    """Gather the elements of each block on a last axis: [*scale_shape, elements of a block]."""
    view = blocked(x, scale_shape)
    order = [*range(0, view.ndim, 2), *range(1, view.ndim, 2)]
    return view.permute(order).reshape(*scale_shape, math.prod(view.shape[1::2]))


def unblock(blocks: Tensor, scale_shape: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
    """The inverse of `per_block`: [*scale_shape, elements] to [*shape]."""
    sizes = [n // b for n, b in zip(shape, scale_shape, strict=True)]
    apart = blocks.reshape(*scale_shape, *sizes)
    order = [
        i for pair in zip(range(len(shape)), range(len(shape), 2 * len(shape)), strict=True) for i in pair
    ]
    return apart.permute(order).reshape(shape)


def per_element(param: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A number for every block, [n0, n1, ...], as one for every element of a tensor of that shape."""
    count = math.prod(shape) // max(param.numel(), 1)
    return unblock(param.unsqueeze(-1).expand(*param.shape, count), tuple(param.shape), shape)


def quantize(x: Tensor, spec: QuantSpec, params: QParams) -> QTensor:
    """Round `x` to the nearest codes under given scales: `code = encode(x * r, zero)`, `r = float32(1 / scale)`.

    Shapes: x any, params.scale `spec.scale_shape(x.shape)`.
    NaN becomes the lowest code, infinities the extreme codes (`docs/numerics.md`); range rules refuse both earlier.

    Raises:
        SpecError: if the parameters do not fit.
    """
    if spec.zero == "none" and params.zero is not None:
        raise SpecError("parameters carry a zero point that the spec has no place for", spec=str(spec))
    scale_shape = spec.scale_shape(tuple(x.shape))
    stored: Tensor | QTensor
    if isinstance(spec.scale, QuantSpec):
        from pennyweight.ranges.minmax import MinMax  # range rules build on this module
        from pennyweight.stats.values import Values

        stored = quantize(params.scale, spec.scale, MinMax()(Values.of(params.scale, spec.scale), spec.scale))
        scale = stored.dequantize()
    else:
        stored = params.scale.to(_SCALE_DTYPE[spec.scale])
        scale = stored.float()
    if tuple(scale.shape) != scale_shape:
        raise SpecError(
            "parameters do not fit", spec=str(spec), shapes=f"{tuple(scale.shape)}, wanted {scale_shape}"
        )
    safe = torch.where(scale == 0, torch.ones_like(scale), scale)
    shape = tuple(x.shape)
    values = blocked(x.detach().float(), scale_shape) * unblocked_param(1.0 / safe, shape)
    zero = None if params.zero is None else unblocked_param(params.zero.float(), shape)
    return QTensor(encode(values, zero, spec).reshape(shape), stored, params.zero, spec)


def encode(values: Tensor, zero: Tensor | None, spec: QuantSpec) -> Tensor:
    """Nearest codes of values in steps: `rint(v) + z`, or `rint(v + z)` where zero points need not be whole."""
    grid = grids[spec.grid]
    if zero is not None and spec.zero == "float":
        return grid.encode(values + zero)
    return grid.encode(values, None if spec.zero == "none" else zero)


def fake_quantize(x: Tensor, spec: QuantSpec, params: QParams) -> Tensor:
    """`quantize` then `dequantize`, in the dtype of `x`."""
    return quantize(x, spec, params).dequantize().to(x.dtype)

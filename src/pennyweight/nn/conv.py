"""Convolutions in one to three dimensions, transposed or not: twin and integer module."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from pennyweight.errors import UnrealisableSite
from pennyweight.nn import twins
from pennyweight.nn.integer import IntegerWeight, clamped
from pennyweight.nn.levels import Levels, on_levels
from pennyweight.nn.linear import activation_quantizer, shifted
from pennyweight.nn.rounding import rounded
from pennyweight.plan import LayerPlan
from pennyweight.qtensor import QTensor

_CONV: dict[int, Any] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSE: dict[int, Any] = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def conv_matrix(weight: Tensor, transposed: bool, groups: int) -> Tensor:
    """Matrix view [out, in / groups * kernel] of a convolution's weight.

    weight: [out, in / groups, *kernel], or for a transposed convolution [in, out / groups, *kernel].
    """
    return forward_weight(weight, transposed, groups).flatten(1)


def forward_weight(weight: Tensor, transposed: bool, groups: int) -> Tensor:
    """The weight with the output channel first, [out, in / groups, *kernel]."""
    if not transposed:
        return weight
    w: Tensor = weight.unflatten(0, (groups, -1)).transpose(1, 2)  # [g, out / g, in / g, *kernel]
    return w.flatten(0, 1)


def backward_weight(weight: Tensor, transposed: bool, groups: int) -> Tensor:
    """The inverse of `forward_weight`."""
    if not transposed:
        return weight
    w: Tensor = weight.unflatten(0, (groups, -1)).transpose(1, 2)  # [g, in / g, out / g, *kernel]
    return w.flatten(0, 1)


class ConvTwin(_ConvNd):
    """`y = conv(Q(x), W') + b + d` with the float module's own parameters and padding; d as in `LinearTwin`."""

    bias_shift: Tensor | None

    def __init__(self, module: _ConvNd, layer: LayerPlan) -> None:
        nn.Module.__init__(self)
        for name, value in vars(module).items():
            if not name.startswith("_") or name == "_reversed_padding_repeated_twice":
                setattr(self, name, value)
        self.weight, self.bias = module.weight, module.bias
        self.layer = layer
        self.input = activation_quantizer(layer, 0, -1 - len(self.kernel_size))
        self.register_buffer("bias_shift", None, persistent=False)
        self.solved: dict[str, QTensor] = {}

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:  # noqa: A002
        """[N, in, *size] -> [N, out, *size']."""
        x = input if self.input is None else self.input(input)
        weight, bias = self.weight, shifted(self.bias, self.bias_shift)
        forward = forward_weight(weight, self.transposed, self.groups)
        matrix = forward.flatten(1)
        used = rounded(self, "weight", matrix)
        if used is not matrix:
            weight = backward_weight(used.reshape(forward.shape), self.transposed, self.groups)
        dims = len(self.kernel_size)
        if self.transposed:
            extra: Any = self.output_padding
            if output_size is not None:
                extra = _ConvTransposeNd._output_padding(
                    cast("Any", self), x, output_size, list(self.stride), list(cast("Any", self.padding)),
                    list(self.kernel_size), dims, list(self.dilation),
                )  # fmt: skip
            out: Tensor = _TRANSPOSE[dims](
                x, weight, bias, self.stride, self.padding, extra, self.groups, self.dilation
            )
        else:
            x, padding = pad_input(x, self)
            out = _CONV[dims](x, weight, bias, self.stride, padding, self.dilation, self.groups)
        return out

    def expected(self, change: Tensor, means: Tensor) -> Tensor:
        """What a change of the weight adds to the outputs, [out], where the input channels [in] have these means.

        change: [out, in / groups * kernel], the matrix view. Padding is taken for more of the same; an output of a
        transposed convolution meets one in `prod(stride)` of its taps.
        """
        rows = change.shape[0]
        taps = change.reshape(rows, self.in_channels // self.groups, -1).sum(-1)
        own = means.reshape(self.groups, -1).repeat_interleave(rows // self.groups, 0)
        shift = (taps * own).sum(1)
        return shift / math.prod(self.stride) if self.transposed else shift


def pad_input(x: Tensor, module: Any) -> tuple[Tensor, list[int]]:
    """Apply padding that the product itself cannot: other modes than zeros, and uneven `padding="same"`."""
    dims = len(module.kernel_size)
    if module.padding_mode != "zeros":
        return F.pad(x, module._reversed_padding_repeated_twice, mode=module.padding_mode), [0] * dims
    if not isinstance(module.padding, str):
        return x, list(module.padding)
    if module.padding == "valid":
        return x, [0] * dims
    both = module._reversed_padding_repeated_twice
    pairs = [(both[2 * i], both[2 * i + 1]) for i in reversed(range(dims))]
    if all(a == b for a, b in pairs):
        return x, [a for a, _ in pairs]
    return F.pad(x, both), [0] * dims


class Placed:
    """Where a convolution's kernel goes: what its float module says, mixed into modules of stored codes."""

    def place(self, twin: ConvTwin) -> None:
        """Take over kernel size, stride, padding, dilation and groups."""
        self.kernel_size, self.stride, self.dilation = (
            twin.kernel_size,
            list(twin.stride),
            list(twin.dilation),
        )
        self.groups, self.transposed, self.padding = twin.groups, twin.transposed, twin.padding
        self.output_padding, self.padding_mode = list(twin.output_padding), twin.padding_mode
        self._reversed_padding_repeated_twice = list(twin._reversed_padding_repeated_twice)

    def padded(self, x: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, tuple[Any, ...]]:
        """The input, batched and padded where the product cannot, and the geometry that opaque ops take."""
        if self.transposed:
            padding = list(cast("Any", self.padding))
        else:
            x, padding = pad_input(x, self)
        x = x if x.ndim == len(self.kernel_size) + 2 else x.unsqueeze(0)
        return x, (
            list(shape),
            self.stride,
            padding,
            self.dilation,
            self.output_padding,
            self.groups,
            self.transposed,
        )


class LevelConv(Levels, Placed):
    """A convolution of floats with weights `levels[codes] * scale`. x: [N, in, *size] -> [N, out, *size']."""

    def __init__(self, twin: ConvTwin, q: QTensor, bias: Tensor | None) -> None:
        super().__init__(twin.layer, q, bias)
        self.place(twin)
        self.shape = tuple(forward_weight(twin.weight.detach(), twin.transposed, twin.groups).shape)

    def forward(self, x: Tensor) -> Tensor:
        """[N, in, *size] -> [N, out, *size']."""
        batched = x.ndim == len(self.kernel_size) + 2
        x, geometry = self.padded(x, self.shape)
        y: Tensor = torch.ops.pennyweight.conv_levels(
            x, self.codes, self.levels, self.scale, self.bias, self.bits, *geometry
        )
        return y if batched else y.squeeze(0)


class IntegerConv(IntegerWeight, Placed):
    """A converted convolution: codes on the matrix view, scales and one opaque op.

    x: [N, in, *size] float; result [N, out, *size'] float, exact in int32 where activations are calibrated.
    """

    def __init__(self, twin: ConvTwin, q: QTensor) -> None:
        weight = forward_weight(twin.weight.detach(), twin.transposed, twin.groups)
        super().__init__(twin.layer, q, tuple(weight.shape))
        if self.mode == "binary" and twin.transposed:
            raise UnrealisableSite(
                "products of signs have no transposed convolution",
                site=twin.layer.name,
                spec=str(q.spec),
                hint="Give it a rule with input uint8[*]+z.",
            )
        self.place(twin)

    def forward(self, x: Tensor) -> Tensor:
        """[N, in, *size] -> [N, out, *size']."""
        batched = x.ndim == len(self.kernel_size) + 2
        x, geometry = self.padded(x, self.shape)
        ops = torch.ops.pennyweight
        if self.mode == "static":
            x = clamped(x, self.x_scale, self.x_zero, self.x_high, self.x_levels)
            y: Tensor = ops.conv(
                x, self.codes, self.scale, self.bias, self.x_scale, self.x_zero, *geometry, self.table
            )
        elif self.mode == "binary":
            y = ops.conv_binary(x, self.codes, self.scale, self.bias, self.x_scale, *geometry)
        elif self.mode == "dynamic":
            y = ops.conv_dynamic(x, self.codes, self.scale, self.bias, *geometry, self.table)
        else:
            y = ops.conv_weight(x, self.codes, self.scale, self.zero, self.bias, self.bits, *geometry)
        return y if batched else y.squeeze(0)


class Conv1dTwin(ConvTwin, nn.Conv1d):
    """See `ConvTwin`; still an `nn.Conv1d` to whoever asks."""


class Conv2dTwin(ConvTwin, nn.Conv2d):
    """See `ConvTwin`; still an `nn.Conv2d` to whoever asks."""


class Conv3dTwin(ConvTwin, nn.Conv3d):
    """See `ConvTwin`; still an `nn.Conv3d` to whoever asks."""


class ConvTranspose1dTwin(ConvTwin, nn.ConvTranspose1d):
    """See `ConvTwin`; still an `nn.ConvTranspose1d` to whoever asks."""


class ConvTranspose2dTwin(ConvTwin, nn.ConvTranspose2d):
    """See `ConvTwin`; still an `nn.ConvTranspose2d` to whoever asks."""


class ConvTranspose3dTwin(ConvTwin, nn.ConvTranspose3d):
    """See `ConvTwin`; still an `nn.ConvTranspose3d` to whoever asks."""


class ConvFamily:
    """See `nn.Family`."""

    def __init__(self, twin: type[ConvTwin]) -> None:
        self.twin = twin

    def prepare(self, module: nn.Module, layer: LayerPlan) -> nn.Module:
        """A `ConvTwin`."""
        return self.twin(cast("_ConvNd", module), layer)

    def shapes(self, module: nn.Module) -> dict[str, tuple[int, int]]:
        """One weight."""
        conv = cast("_ConvNd", module)
        return {"weight": (conv.out_channels, conv.in_channels // conv.groups * math.prod(conv.kernel_size))}

    def matrices(self, twin: nn.Module) -> dict[str, Tensor]:
        """The weight, [out, in / groups * kernel]."""
        conv = cast("ConvTwin", twin)
        return {"weight": conv_matrix(conv.weight.detach(), conv.transposed, conv.groups)}

    def convert(self, twin: nn.Module) -> nn.Module:
        """An `IntegerConv`, or a `LevelConv` where levels are no integers."""
        conv = cast("ConvTwin", twin)
        q = conv.solved["weight"]
        bias = shifted(conv.bias, conv.bias_shift)
        bias = None if bias is None else bias.detach().float()
        if on_levels(conv.layer, q):
            return LevelConv(conv, q, bias)
        out = IntegerConv(conv, q)
        if conv.input is not None:
            out.calibrated(conv.input)
            bias = bias if out.mode == "binary" else out.integer_bias(bias)
        out.register_buffer("bias", bias)
        return out


for _twin in (
    Conv1dTwin,
    Conv2dTwin,
    Conv3dTwin,
    ConvTranspose1dTwin,
    ConvTranspose2dTwin,
    ConvTranspose3dTwin,
):
    twins.add(_twin.__name__.removesuffix("Twin"), ConvFamily(_twin))

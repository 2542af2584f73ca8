"""Batch normalisation that no convolution takes in (pre-activation nets, dense blocks): a map of codes, per channel."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pennyweight.nn import twins
from pennyweight.nn.fake import ActivationQuantizer
from pennyweight.nn.integer import greatest_code, unsigned_params
from pennyweight.nn.linear import activation_quantizer
from pennyweight.plan import LayerPlan
from pennyweight.qtensor import QTensor


class BatchNormTwin(_BatchNorm):
    """The float module's normalisation of a quantized input, with its own parameters and running statistics."""

    def __init__(self, module: _BatchNorm, layer: LayerPlan) -> None:
        nn.Module.__init__(self)
        for name, value in vars(module).items():
            if not name.startswith("_"):
                setattr(self, name, value)
        for name, parameter in module._parameters.items():
            self.register_parameter(name, parameter)
        for name, buffer in module._buffers.items():
            self.register_buffer(name, buffer)
        self.layer = layer
        self.input = activation_quantizer(layer, 0)
        self.solved: dict[str, QTensor] = {}

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (the name of the class this is a twin of)
        """[N, C, *space] -> the same."""
        x = input if self.input is None else self.input(input)
        return super().forward(x)


class BatchNorm1dTwin(BatchNormTwin, nn.BatchNorm1d):
    """See `BatchNormTwin`."""


class BatchNorm2dTwin(BatchNormTwin, nn.BatchNorm2d):
    """See `BatchNormTwin`."""


class BatchNorm3dTwin(BatchNormTwin, nn.BatchNorm3d):
    """See `BatchNormTwin`."""


class IntegerBatchNorm(nn.Module):
    """Converted, for running statistics: `y = x' * g + b` with `x'` the rounded input and, in float64 before storing,

        g = gamma / sqrt(var + eps),   b = beta - mean * g

    Between codes a program does it in one step, `affine_q`. gain, shift: float32 [C].
    """

    gain: Tensor
    shift: Tensor
    x_scale: Tensor
    x_zero: Tensor

    def __init__(self, twin: BatchNormTwin) -> None:
        super().__init__()
        self.layer = twin.layer
        mean, var = cast("Tensor", twin.running_mean).double(), cast("Tensor", twin.running_var).double()
        gain = 1.0 / torch.sqrt(var + twin.eps)
        if twin.affine:
            gain = gain * twin.weight.detach().double()
        shift = -mean * gain + (twin.bias.detach().double() if twin.affine else 0.0)
        self.register_buffer("gain", gain.float())
        self.register_buffer("shift", shift.float())
        scale, zero = unsigned_params(cast("ActivationQuantizer", twin.input))
        self.register_buffer("x_scale", scale)
        self.register_buffer("x_zero", zero)
        self.x_high = greatest_code(cast("ActivationQuantizer", twin.input).spec)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, *space] -> the same."""
        rounded = torch.ops.pennyweight.round_to_codes(x, self.x_scale, self.x_zero, self.x_high)
        shape = [-1, *[1] * (x.dim() - 2)]
        return rounded * self.gain.reshape(shape) + self.shift.reshape(shape)  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        """Scheme, for printing."""
        return f"{self.layer.kind}, input={self.layer.inputs.get(0)}, channels={len(self.gain)}"


class BatchNormFamily:
    """See `nn.Family`. A norm by the statistics of the batch has nothing to convert: it stays as it is, in float."""

    def __init__(self, twin: type[Any]) -> None:
        self.twin = twin

    def prepare(self, module: nn.Module, layer: LayerPlan) -> nn.Module:
        """A `BatchNormTwin`, or the module itself where there are no running statistics."""
        if cast("_BatchNorm", module).running_mean is None:
            return module
        return cast("nn.Module", self.twin(module, layer))

    def shapes(self, module: nn.Module) -> dict[str, tuple[int, int]]:
        """No weight."""
        return {}

    def matrices(self, twin: nn.Module) -> dict[str, Tensor]:
        """No weight."""
        return {}

    def convert(self, twin: nn.Module) -> nn.Module:
        """An `IntegerBatchNorm`."""
        return IntegerBatchNorm(cast("BatchNormTwin", twin))


twins.add("BatchNorm1d", BatchNormFamily(BatchNorm1dTwin))
twins.add("BatchNorm2d", BatchNormFamily(BatchNorm2dTwin))
twins.add("BatchNorm3d", BatchNormFamily(BatchNorm3dTwin))

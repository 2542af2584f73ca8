"""`nn.Linear`: twin and integer module."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pennyweight.nn import twins
from pennyweight.nn.fake import ActivationQuantizer
from pennyweight.nn.integer import IntegerWeight, clamped
from pennyweight.nn.levels import LevelLinear, on_levels
from pennyweight.nn.rounding import rounded
from pennyweight.plan import LayerPlan
from pennyweight.qtensor import QTensor


class LinearTwin(nn.Linear):
    """`y = Q(x) W'^T + b + d` with the float module's own parameters.

    `W'` is the solved weight once there is one, d the shift [out] that a pass has found for it, if any.
    """

    bias_shift: Tensor | None

    def __init__(self, module: nn.Linear, layer: LayerPlan) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = module.in_features, module.out_features
        self.weight, self.bias = module.weight, module.bias
        self.layer = layer
        self.input = activation_quantizer(layer, 0, -1)
        self.register_buffer("bias_shift", None, persistent=False)
        self.solved: dict[str, QTensor] = {}
        self.training = module.training

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (the name of the class this is a twin of)
        """[..., in] -> [..., out]."""
        x = input if self.input is None else self.input(input)
        weight = rounded(self, "weight", self.weight)
        return F.linear(x, weight, shifted(self.bias, self.bias_shift))

    def expected(self, change: Tensor, means: Tensor) -> Tensor:
        """What a change of the weight [out, in] adds to the outputs, [out], where the inputs [in] have these means."""
        return change @ means


def shifted(bias: Tensor | None, shift: Tensor | None) -> Tensor | None:
    """`b + d`, either of which may be missing. Shapes: [out]."""
    if shift is None:
        return bias
    return shift if bias is None else bias + shift


def activation_quantizer(
    layer: LayerPlan, position: int, axis: int | None = None
) -> ActivationQuantizer | None:
    """A quantizer for a calibrated operand, None for one that stays in float or is ranged at run time.

    `axis` is where the operand's channels are, if statistics are to be kept by channel.
    """
    if position not in layer.inputs or layer.dynamic:
        return None
    return ActivationQuantizer(layer.inputs[position], str(layer.input_site(position)), axis)


class IntegerLinear(IntegerWeight):
    """A converted linear layer: codes, scales and one opaque op.

    x: [..., in] float; result [..., out] float. With calibrated activations the product is exact in int32.
    """

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        ops = torch.ops.pennyweight
        if self.mode == "static":
            x = clamped(x, self.x_scale, self.x_zero, self.x_high, self.x_levels)
            y: Tensor = ops.linear(
                x, self.codes, self.scale, self.bias, self.x_scale, self.x_zero, self.table
            )
        elif self.mode == "binary":
            y = ops.linear_binary(x, self.codes, self.scale, self.bias, self.x_scale, self.in_features)
        elif self.mode == "dynamic":
            y = ops.linear_dynamic(x, self.codes, self.scale, self.bias, self.per_token, self.table)
        elif self.mode == "grouped":
            y = ops.linear_grouped(
                x, self.codes, self.scale, self.bias, self.per_token, self.bits, self.in_features
            )
        else:
            y = ops.linear_weight(
                x, self.codes, self.scale, self.zero, self.bias, self.bits, self.in_features
            )
        return y


class LinearFamily:
    """See `nn.Family`."""

    def prepare(self, module: nn.Module, layer: LayerPlan) -> nn.Module:
        """A `LinearTwin`."""
        return LinearTwin(cast("nn.Linear", module), layer)

    def shapes(self, module: nn.Module) -> dict[str, tuple[int, int]]:
        """One weight."""
        linear = cast("nn.Linear", module)
        return {"weight": (linear.out_features, linear.in_features)}

    def matrices(self, twin: nn.Module) -> dict[str, Tensor]:
        """The weight, [out, in]."""
        return {"weight": cast("nn.Linear", twin).weight.detach()}

    def convert(self, twin: nn.Module) -> nn.Module:
        """An `IntegerLinear`, or a `LevelLinear` where levels are no integers."""
        twin = cast("LinearTwin", twin)
        q = twin.solved["weight"]
        bias = shifted(twin.bias, twin.bias_shift)
        bias = None if bias is None else bias.detach().float()
        if on_levels(twin.layer, q):
            return LevelLinear(twin.layer, q, bias)
        out = IntegerLinear(twin.layer, q, (twin.out_features, twin.in_features))
        if twin.input is not None:
            out.calibrated(twin.input)
            bias = bias if out.mode == "binary" else out.integer_bias(bias)
        out.register_buffer("bias", bias)
        return out


twins.add("Linear", LinearFamily())

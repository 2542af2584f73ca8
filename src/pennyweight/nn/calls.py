"""Twins of function calls: `a + b`, `a @ b`, `F.linear(x, self.weight)` and the like."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from pennyweight.errors import UnrealisableSite
from pennyweight.graph import ops
from pennyweight.nn.conv import backward_weight, conv_matrix, forward_weight
from pennyweight.nn.fake import ActivationQuantizer
from pennyweight.nn.integer import IntegerWeight, clamped, greatest_code, unsigned_params
from pennyweight.nn.linear import activation_quantizer
from pennyweight.nn.rounding import rounded
from pennyweight.plan import LayerPlan
from pennyweight.qtensor import QTensor

Function = Callable[..., Any]


class CallTwin(nn.Module):
    """Quantizers of the operands of one function call, and for `F.linear` and `F.conv` the solved weight."""

    def __init__(self, layer: LayerPlan, param: str = "") -> None:
        super().__init__()
        self.layer, self.param = layer, param
        quantizers = {str(p): activation_quantizer(layer, p) for p in layer.inputs}
        self.quantizers = nn.ModuleDict({p: q for p, q in quantizers.items() if q is not None})
        self.solved: dict[str, QTensor] = {}
        self.geometry: tuple[Any, ...] = ()
        self.weight_shape: tuple[int, ...] = ()

    def forward(self, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call `func` on quantized operands."""
        if self.layer.kind in ops.FUNCTIONAL_LAYERS:
            args = self._layer_operands(args, kwargs)
            kwargs = {}
            x = self.quantizers["0"](args[0]) if "0" in self.quantizers else args[0]
            return func(x, *args[1:])
        flat, tree = tree_flatten((args, kwargs))
        for position, quantizer in self.quantizers.items():
            flat[int(position)] = quantizer(flat[int(position)])
        args, kwargs = tree_unflatten(flat, tree)
        return func(*args, **kwargs)

    def _layer_operands(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """Positional operands of `F.linear` or `F.conv*`; remembers the geometry, swaps in the solved weight."""
        bound = bind_layer(self.layer.kind, args, kwargs)
        weight = bound[1]
        self.geometry = bound[3:]
        self.weight_shape = tuple(weight.shape)
        transposed, groups = is_transposed(self.layer.kind), conv_groups(self.layer.kind, bound)
        forward = forward_weight(weight, transposed, groups)
        matrix = forward.flatten(1)
        used = rounded(self, "weight", matrix)
        if used is not matrix:
            weight = backward_weight(used.reshape(forward.shape), transposed, groups)
        return (bound[0], weight, *bound[2:])


def is_transposed(kind: str) -> bool:
    """Whether `F.<kind>` is a transposed convolution."""
    return kind.startswith("conv_transpose")


def conv_groups(kind: str, bound: tuple[Any, ...]) -> int:
    """The groups of a bound call (operand 6 of every convolution); 1 for a linear layer."""
    return 1 if kind == "linear" else int(bound[6])


def bind_layer(kind: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """Operands of `F.linear`, `F.conv*` or `F.conv_transpose*` in the order of their signature, defaults filled in."""
    signature: dict[str, Any] = {"input": None, "weight": None, "bias": None}
    if is_transposed(kind):
        signature |= {"stride": 1, "padding": 0, "output_padding": 0, "groups": 1, "dilation": 1}
    elif kind != "linear":
        signature |= {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}
    return tuple(args[i] if i < len(args) else kwargs.get(n, d) for i, (n, d) in enumerate(signature.items()))


class IntegerCall(nn.Module):
    """A converted call between integer operations: each operand is rounded to codes and back, then the call is made.

    scales, zeros: 0-d float32 buffers `scale_<position>`, `zero_<position>`.
    """

    def __init__(self, twin: CallTwin) -> None:
        super().__init__()
        self.layer = twin.layer
        self.positions = [int(p) for p in twin.quantizers]
        for position, quantizer in twin.quantizers.items():
            scale, zero = unsigned_params(cast("ActivationQuantizer", quantizer))
            self.register_buffer(f"scale_{position}", scale)
            self.register_buffer(f"zero_{position}", zero)
        self.highs = {
            int(p): greatest_code(cast("ActivationQuantizer", q).spec) for p, q in twin.quantizers.items()
        }

    def parameters_of(self, position: int) -> tuple[Tensor, Tensor]:
        """Scale and zero point of an operand."""
        return cast("Tensor", getattr(self, f"scale_{position}")), cast(
            "Tensor", getattr(self, f"zero_{position}")
        )

    def forward(self, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call `func` on rounded operands."""
        flat, tree = tree_flatten((args, kwargs))
        for position in self.positions:
            flat[position] = torch.ops.pennyweight.round_to_codes(
                flat[position], *self.parameters_of(position), self.highs[position]
            )
        args, kwargs = tree_unflatten(flat, tree)
        return func(*args, **kwargs)


class IntegerMatmul(IntegerCall):
    """`a @ b` on codes: int32 products, exact."""

    def forward(self, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """[..., m, k] and [..., k, n] -> [..., m, n]."""
        a, b = tree_flatten((args, kwargs))[0][:2]
        first, second = self.parameters_of(0), self.parameters_of(1)
        a, b = clamped(a, *first, self.highs[0]), clamped(b, *second, self.highs[1])
        if self.layer.kind == "rmatmul":
            return torch.ops.pennyweight.matmul(b, a, *second, *first)
        return torch.ops.pennyweight.matmul(a, b, *first, *second)


class IntegerAttention(IntegerCall):
    """Scaled dot product attention on codes: int32 products, probabilities on 0 .. 255 / 255."""

    def forward(self, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """query [..., t, d], key [..., s, d], value [..., s, e] -> [..., t, e]."""
        signature: dict[str, Any] = {
            "query": None, "key": None, "value": None, "attn_mask": None, "dropout_p": 0.0, "is_causal": False,
            "scale": None, "enable_gqa": False,
        }  # fmt: skip
        values = [
            args[i] if i < len(args) else kwargs.get(n, d) for i, (n, d) in enumerate(signature.items())
        ]
        query, key, value, mask, dropout, causal, scale, grouped = values
        if dropout:
            raise UnrealisableSite("attention with dropout runs in float", site=self.layer.name)
        if grouped:
            repeat = query.shape[-3] // key.shape[-3]
            key, value = key.repeat_interleave(repeat, -3), value.repeat_interleave(repeat, -3)
        scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
        q, k, v = self.parameters_of(0), self.parameters_of(1), self.parameters_of(2)
        query, key, value = (
            clamped(x, *p, self.highs[i]) for i, (x, p) in enumerate(((query, q), (key, k), (value, v)))
        )
        return torch.ops.pennyweight.attention(
            query, key, value, mask, bool(causal), float(scale), *q, *k, *v
        )


class IntegerLayerCall(IntegerWeight):
    """`F.linear` or `F.conv*` on a raw parameter, converted: the codes stand in for the parameter."""

    def __init__(self, twin: CallTwin, bias: Tensor | None) -> None:
        kind = twin.layer.kind
        transposed = is_transposed(kind)
        groups = conv_groups(kind, (None, None, None, *twin.geometry))
        shape = list(twin.weight_shape)
        if transposed:
            shape = [shape[1] * groups, shape[0] // groups, *shape[2:]]
        super().__init__(twin.layer, twin.solved["weight"], tuple(shape))
        self.transposed = transposed
        if "0" in twin.quantizers:
            self.calibrated(cast("ActivationQuantizer", twin.quantizers["0"]))
            bias = self.integer_bias(bias)
        self.register_buffer("bias", bias)

    def forward(self, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Same shapes as the call it replaces."""
        bound, o = bind_layer(self.layer.kind, args, kwargs), torch.ops.pennyweight
        x = bound[0]
        if self.layer.kind == "linear":
            if self.mode == "static":
                x = clamped(x, self.x_scale, self.x_zero, self.x_high, self.x_levels)
                return o.linear(x, self.codes, self.scale, self.bias, self.x_scale, self.x_zero, self.table)
            if self.mode == "dynamic":
                return o.linear_dynamic(x, self.codes, self.scale, self.bias, self.per_token, self.table)
            if self.mode == "grouped":
                return o.linear_grouped(
                    x, self.codes, self.scale, self.bias, self.per_token, self.bits, self.in_features
                )
            return o.linear_weight(
                x, self.codes, self.scale, self.zero, self.bias, self.bits, self.in_features
            )
        dims = len(self.shape) - 2
        stride, padding = _tuple(bound[3], dims), bound[4]
        if self.transposed:
            extra, groups, dilation = _tuple(bound[5], dims), bound[6], _tuple(bound[7], dims)
        else:
            extra, groups, dilation = [0] * dims, bound[6], _tuple(bound[5], dims)
        if isinstance(padding, str):
            padding = (
                [d * (k - 1) // 2 for d, k in zip(dilation, self.shape[2:], strict=True)]
                if padding == "same"
                else 0
            )
        geometry = (list(self.shape), stride, _tuple(padding, dims), dilation, extra, groups, self.transposed)
        if self.mode == "static":
            x = clamped(x, self.x_scale, self.x_zero, self.x_high, self.x_levels)
            return o.conv(
                x, self.codes, self.scale, self.bias, self.x_scale, self.x_zero, *geometry, self.table
            )
        if self.mode == "dynamic":
            return o.conv_dynamic(x, self.codes, self.scale, self.bias, *geometry, self.table)
        return o.conv_weight(x, self.codes, self.scale, self.zero, self.bias, self.bits, *geometry)


def _tuple(value: Any, dims: int) -> list[int]:
    return [int(value)] * dims if isinstance(value, int) else [int(v) for v in value]


def call_matrix(twin: CallTwin, weight: Tensor) -> Tensor:
    """Matrix view [out, in * kernel] of the raw parameter of a functional layer."""
    if twin.layer.kind == "linear":
        return weight.detach()
    groups = conv_groups(twin.layer.kind, (None, None, None, *twin.geometry))
    return conv_matrix(weight.detach(), is_transposed(twin.layer.kind), groups)


def convert_call(twin: CallTwin, bias: Tensor | None = None) -> nn.Module:
    """The integer form of a calibrated call. `bias` is the float bias of a functional layer."""
    kind = twin.layer.kind
    if kind in ops.FUNCTIONAL_LAYERS:
        return IntegerLayerCall(twin, bias)
    if kind in ops.MATMULS:
        return IntegerMatmul(twin)
    if kind in ops.ATTENTION:
        return IntegerAttention(twin)
    return IntegerCall(twin)

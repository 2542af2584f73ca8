"""`XNNPACKQuantizer`: 8-bit integers as ARM phones run them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.fx import Node

from pennyweight.compat.quantization.quantizer.annotators import (
    Filter,
    Named,
    QuantizationConfig,
    annotate_binary,
    annotate_pools,
    annotate_products,
    in_module_named,
    in_module_type,
    kind_of,
)
from pennyweight.compat.quantization.quantizer.quantizer import QuantizationSpec, Quantizer
from pennyweight.graph import ops

_PRODUCTS = frozenset({"linear", "conv1d", "conv2d", "conv_transpose1d", "conv_transpose2d"})
_BINARY = frozenset({"add", "mul"})


@functools.lru_cache
def get_symmetric_quantization_config(
    is_per_channel: bool = False,
    is_qat: bool = False,
    is_dynamic: bool = False,
    act_qmin: int = -128,
    act_qmax: int = 127,
    weight_qmin: int = -127,
    weight_qmax: int = 127,
) -> QuantizationConfig:
    """int8 with symmetric weights and, as XNNPACK has them, activations with a zero point.

    Args:
        is_per_channel: one weight scale per output channel; one per tensor otherwise.
        is_qat: for training.
        is_dynamic: activations are ranged at run time; linear layers alone are quantized.
        act_qmin: least code of activations; act_qmax the greatest.
        act_qmax: see there.
        weight_qmin: least code of weights; weight_qmax the greatest.
        weight_qmax: see there.
    """
    observer = "MovingAverageMinMaxObserver" if is_qat else "HistogramObserver"
    seen = (
        Named("FakeQuantize" if is_dynamic else "FusedMovingAvgObsFakeQuantize")
        if is_qat
        else Named(observer)
    )
    by_channel = "MovingAveragePerChannelMinMaxObserver" if is_qat else "PerChannelMinMaxObserver"
    activation = QuantizationSpec(
        torch.int8, Named("PlaceholderObserver") if is_dynamic and not is_qat else seen, act_qmin, act_qmax,
        torch.per_tensor_affine, is_dynamic=is_dynamic,
    )  # fmt: skip
    weight = QuantizationSpec(
        torch.int8,
        Named(by_channel if is_per_channel else "MinMaxObserver"),
        weight_qmin,
        weight_qmax,
        torch.per_channel_symmetric if is_per_channel else torch.per_tensor_symmetric,
        ch_axis=0,
    )
    return QuantizationConfig(activation, None if is_dynamic else activation, weight, None, is_qat)


class XNNPACKQuantizer(Quantizer):
    """Linear layers and convolutions with the norm and clip behind them, sums, products, pools and joins.

    The most specific setting decides: module name, then module type, then operator, then the global one. A name or type
    set to None stays in float.
    """

    def __init__(self) -> None:
        super().__init__()
        self.global_config: QuantizationConfig | None = None
        self.operator_type_config: dict[Any, QuantizationConfig | None] = {}
        self.module_type_config: dict[Any, QuantizationConfig | None] = {}
        self.module_name_config: dict[str, QuantizationConfig | None] = {}
        self.filter_fn: Filter | None = None

    def set_global(self, quantization_config: QuantizationConfig) -> XNNPACKQuantizer:
        """For all that nothing else names. Returns the quantizer."""
        self.global_config = quantization_config
        return self

    def set_operator_type(
        self, operator_type: Any, quantization_config: QuantizationConfig
    ) -> XNNPACKQuantizer:
        """For an operator, such as `torch.ops.aten.linear.default`. Returns the quantizer."""
        self.operator_type_config[operator_type] = quantization_config
        return self

    def set_module_type(
        self, module_type: Callable[..., Any], quantization_config: QuantizationConfig | None
    ) -> XNNPACKQuantizer:
        """For everything in modules of a class. Returns the quantizer."""
        self.module_type_config[module_type] = quantization_config
        return self

    def set_module_name(
        self, module_name: str, quantization_config: QuantizationConfig | None
    ) -> XNNPACKQuantizer:
        """For everything in the module of a path. Returns the quantizer."""
        self.module_name_config[module_name] = quantization_config
        return self

    def set_filter_function(self, filter_fn: Filter) -> XNNPACKQuantizer:
        """Leave out the nodes for which it is false. Returns the quantizer."""
        self.filter_fn = filter_fn
        return self

    def annotate(self, model: fx.GraphModule) -> fx.GraphModule:
        """See `Quantizer`."""
        settings: list[tuple[Filter, QuantizationConfig | None]] = []
        settings += [(in_module_named(name), c) for name, c in self.module_name_config.items()]
        settings += [(in_module_type(kind), c) for kind, c in self.module_type_config.items()]
        settings += [(_calls(operator), c) for operator, c in self.operator_type_config.items()]
        settings.append((lambda node: True, self.global_config))
        for number, (wanted, config) in enumerate(settings):
            if config is not None:
                self._annotate(model, config, self._free(wanted, [w for w, _ in settings[:number]]))
        return model

    def _free(self, wanted: Filter, before: list[Filter]) -> Filter:
        """Nodes that no more specific setting decides about."""
        chosen = self.filter_fn

        def free(node: Node) -> bool:
            return wanted(node) and not any(w(node) for w in before) and (chosen is None or chosen(node))

        return free

    def _annotate(self, model: fx.GraphModule, config: QuantizationConfig, wanted: Filter) -> None:
        if config.is_dynamic:
            annotate_products(model, config, wanted, {"linear"}, output=False)
            return
        annotate_products(model, config, wanted, _PRODUCTS)
        annotate_binary(model, config, wanted, _BINARY)
        annotate_pools(model, config, wanted, ops.JOINS | {"adaptive_avg_pool2d"})
        annotate_pools(model, config, wanted, {"mean", "avg_pool2d"}, follow=True)

    def validate(self, model: fx.GraphModule) -> None:
        """Nothing: what the engine cannot run is refused when rules are made."""


def _calls(operator: Any) -> Filter:
    return lambda node: (
        node.op == "call_function"
        and (
            node.target == operator
            or getattr(node.target, "overloadpacket", None) == operator
            or kind_of(node) == operator
        )
    )

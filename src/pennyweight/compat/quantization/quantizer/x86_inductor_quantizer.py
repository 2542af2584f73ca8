"""`X86InductorQuantizer`: unsigned activations and signed weights by channel, as x86 servers run them."""

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
    is_annotated,
    kind_of,
)
from pennyweight.compat.quantization.quantizer.quantizer import QuantizationSpec, Quantizer
from pennyweight.errors import InputError, nearest
from pennyweight.graph import ops

_PRODUCTS = frozenset({"linear", "conv1d", "conv2d"})
_SHARED = frozenset({"max_pool2d", "cat", "avg_pool2d", "adaptive_avg_pool2d", "flatten"})
_KINDS = _PRODUCTS | _SHARED | {"matmul"}
_MODULES = {
    "Conv1d": "conv1d", "Conv2d": "conv2d", "Linear": "linear", "MaxPool2d": "max_pool2d", "AvgPool2d": "avg_pool2d",
    "AdaptiveAvgPool2d": "adaptive_avg_pool2d", "Flatten": "flatten",
}  # fmt: skip


@functools.lru_cache
def get_default_x86_inductor_quantization_config(
    is_qat: bool = False, is_dynamic: bool = False, reduce_range: bool = False
) -> QuantizationConfig:
    """uint8 activations with a zero point, symmetric int8 weights with one scale per output channel.

    Args:
        is_qat: for training.
        is_dynamic: activations are ranged at run time.
        reduce_range: 7-bit activations, for kernels whose sums saturate. Ours do not: it is read, and 8 bits are kept.
    """
    activation = QuantizationSpec(
        torch.uint8,
        Named(
            "FusedMovingAvgObsFakeQuantize"
            if is_qat
            else "PlaceholderObserver"
            if is_dynamic
            else "HistogramObserver"
        ),
        0,
        127 if reduce_range else 255,
        torch.per_tensor_affine,
        is_dynamic=is_dynamic,
    )
    observer = "FusedMovingAvgObsFakeQuantize" if is_qat else "PerChannelMinMaxObserver"
    weight = QuantizationSpec(torch.int8, Named(observer), -128, 127, torch.per_channel_symmetric, ch_axis=0)
    return QuantizationConfig(activation, None if is_dynamic else activation, weight, None, is_qat)


class X86InductorQuantizer(Quantizer):
    """Linear layers and convolutions, the sums behind convolutions, and pools and joins between quantized values.

    The most specific setting decides: module name, then function, then the global one. `torch.matmul` is quantized only
    where a setting names it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.global_config: QuantizationConfig | None = None
        self.function_config: dict[str, QuantizationConfig | None] = {}
        self.module_name_qconfig: dict[str, QuantizationConfig | None] = {}

    def set_global(self, quantization_config: QuantizationConfig) -> X86InductorQuantizer:
        """For all that nothing else names. Returns the quantizer."""
        self.global_config = quantization_config
        return self

    def get_global_quantization_config(self) -> QuantizationConfig | None:
        """What `set_global` set."""
        return self.global_config

    def set_function_type_qconfig(
        self, function_type: Callable[..., Any], quantization_config: QuantizationConfig | None
    ) -> X86InductorQuantizer:
        """For a function, such as `torch.nn.functional.linear`; None leaves it in float. Returns the quantizer.

        Raises:
            InputError: for a function that this backend does not quantize.
        """
        return self._set(str(getattr(function_type, "__name__", function_type)), quantization_config)

    def set_module_type_qconfig(
        self, module_type: type[torch.nn.Module], quantization_config: QuantizationConfig | None
    ) -> X86InductorQuantizer:
        """For the function that modules of a class call; None leaves it in float. Returns the quantizer.

        Raises:
            InputError: for a class that this backend does not quantize.
        """
        name = module_type.__name__
        if name not in _MODULES:
            raise InputError(
                f"{name} is not quantized by this quantizer", hint=nearest(name, _MODULES, "classes")
            )
        return self._set(_MODULES[name], quantization_config)

    def _set(self, kind: str, config: QuantizationConfig | None) -> X86InductorQuantizer:
        if kind not in _KINDS:
            raise InputError(
                f"{kind} is not quantized by this quantizer", hint=nearest(kind, _KINDS, "functions")
            )
        self.function_config[kind] = config
        return self

    def set_module_name_qconfig(
        self, module_name: str, quantization_config: QuantizationConfig | None
    ) -> X86InductorQuantizer:
        """For everything in the module of a path; None leaves it in float. Returns the quantizer."""
        self.module_name_qconfig[module_name] = quantization_config
        return self

    def annotate(self, model: fx.GraphModule) -> fx.GraphModule:
        """See `Quantizer`."""
        settings: list[tuple[Filter, QuantizationConfig | None]] = []
        settings += [(in_module_named(name), c) for name, c in self.module_name_qconfig.items()]
        settings += [(_is(kind), c) for kind, c in self.function_config.items()]
        settings.append((lambda node: kind_of(node) != "matmul", self.global_config))
        for number, (wanted, config) in enumerate(settings):
            if config is not None:
                self._annotate(model, config, _free(wanted, [w for w, _ in settings[:number]]))
        for number, (wanted, config) in enumerate(settings):
            if config is not None and not config.is_dynamic:
                free = _free(wanted, [w for w, _ in settings[:number]])
                annotate_pools(model, config, free, _SHARED - ops.MOVES, follow=True)
        return model

    def _annotate(self, model: fx.GraphModule, config: QuantizationConfig, wanted: Filter) -> None:
        static = not config.is_dynamic
        annotate_products(model, config, wanted, _PRODUCTS if static else {"linear"}, output=False)
        if static:
            annotate_binary(model, config, wanted, {"matmul"}, output=False)
            annotate_binary(
                model, config, lambda n: wanted(n) and _takes_convolution(n), {"add"}, output=False
            )

    def validate(self, model: fx.GraphModule) -> None:
        """Nothing: what the engine cannot run is refused when rules are made."""


def _is(kind: str) -> Filter:
    return lambda node: kind_of(node) == kind


def _free(wanted: Filter, before: list[Filter]) -> Filter:
    return lambda node: wanted(node) and not any(w(node) for w in before)


def _takes_convolution(node: Node) -> bool:
    """A sum that takes in the result of a quantized convolution, or the clip behind such a sum."""
    if kind_of(node) != "add":
        return True
    operands = [a for a in node.args[:2] if isinstance(a, Node)]
    return any(is_annotated([a]) and _product_behind(a).startswith("conv") for a in operands)


def _product_behind(node: Node) -> str:
    """The kind of product that a norm or clip follows."""
    while kind_of(node) in ops.CLIPS | {"batch_norm"} and isinstance(node.args[0], Node):
        node = node.args[0]
    return kind_of(node)

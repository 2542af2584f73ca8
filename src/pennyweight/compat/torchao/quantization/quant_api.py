"""`quantize_` and its configurations: each is a recipe of the core."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from pennyweight import pipeline
from pennyweight.compat.torchao.quantization.granularity import Granularity, PerAxis, PerGroup, block_text
from pennyweight.errors import InputError, NothingQuantized, PennyweightError
from pennyweight.passes.solve import Solve
from pennyweight.plan import Rule
from pennyweight.recipe import Recipe
from pennyweight.spec import QuantSpec

Filter = Callable[[nn.Module, str], bool]
TOKENS = "uint8[1,*]+z"  # per token, asymmetric, ranged at run time
_BITS: dict[Any, int] = {getattr(torch, f"int{bits}"): bits for bits in range(1, 9)}


@dataclass(frozen=True)
class AOBaseConfig:
    """What every configuration has: a weight, and how activations are taken."""

    dynamic: ClassVar[bool] = False

    def weight(self) -> QuantSpec:
        """Spec of the weights."""
        raise NotImplementedError

    def rules(self, names: Iterable[str] = ("*",), types: tuple[str, ...] = ("Linear",)) -> tuple[Rule, ...]:
        """Rules for the layers named; where groups do not divide a row, the row has one scale."""
        spec, tokens = self.weight(), QuantSpec.parse(TOKENS) if self.dynamic else None
        found: list[Rule] = []
        for name in names:
            shared: dict[str, Any] = {"input": tokens, "dynamic": self.dynamic, "optional": True}
            if spec.block not in ((), (1, None)):
                found.append(Rule(name, types, weight=spec, fitting=True, **shared))
                spec_row = QuantSpec(spec.grid, (1, None), spec.zero)
                found.append(Rule(name, types, weight=spec_row, **shared))
            else:
                found.append(Rule(name, types, weight=spec, **shared))
        return tuple(found)

    def recipe(self, names: Iterable[str] = ("*",), types: tuple[str, ...] = ("Linear",)) -> Recipe:
        """The recipe of the core that this configuration is."""
        return Recipe(type(self).__name__, self.rules(names, types), (Solve("rtn", "minmax"),))


@dataclass(frozen=True)
class Int8WeightOnlyConfig(AOBaseConfig):
    """int8 weights, one scale per row or group; float activations."""

    group_size: int | None = None
    set_inductor_config: bool = True

    def weight(self) -> QuantSpec:
        """Symmetric int8."""
        return QuantSpec.parse(f"int8n[{self.group_size or '1,*'}]")


@dataclass(frozen=True)
class Int4WeightOnlyConfig(AOBaseConfig):
    """int4 weights in groups, asymmetric; float activations. Layouts and kernels of other machines are ignored."""

    group_size: int = 128
    layout: Any = None
    use_hqq: bool = False
    zero_point_domain: Any = None
    set_inductor_config: bool = True
    preserve_zero: bool | None = None

    def weight(self) -> QuantSpec:
        """Asymmetric int4 in groups."""
        return QuantSpec.parse(f"uint4[{self.group_size}]+z")


@dataclass(frozen=True)
class Int8DynamicActivationInt8WeightConfig(AOBaseConfig):
    """int8 activations per token, ranged at run time, times int8 weights per row."""

    layout: Any = None
    act_mapping_type: Any = None
    weight_only_decode: bool = False
    set_inductor_config: bool = True
    dynamic: ClassVar[bool] = True

    def weight(self) -> QuantSpec:
        """Symmetric int8 per row."""
        return QuantSpec.parse("int8n[1,*]")


@dataclass(frozen=True)
class Int8DynamicActivationInt4WeightConfig(AOBaseConfig):
    """int8 activations per token, ranged at run time, times int4 weights in groups (8da4w)."""

    group_size: int = 32
    layout: Any = None
    mapping_type: Any = None
    act_mapping_type: Any = None
    set_inductor_config: bool = True
    dynamic: ClassVar[bool] = True

    def weight(self) -> QuantSpec:
        """Symmetric int4 in groups."""
        return QuantSpec.parse(f"int4[{self.group_size}]")


@dataclass(frozen=True)
class IntxWeightOnlyConfig(AOBaseConfig):
    """Weights of 2 to 8 bits, symmetric; float activations."""

    weight_dtype: torch.dtype = torch.int8
    granularity: Granularity = field(default_factory=lambda: PerAxis(0))
    mapping_type: Any = None
    scale_dtype: torch.dtype | None = None

    def weight(self) -> QuantSpec:
        """Symmetric integers."""
        return QuantSpec.parse(f"int{bits_of(self.weight_dtype)}[{block_text(self.granularity)}]")


@dataclass(frozen=True)
class Int8DynamicActivationIntxWeightConfig(IntxWeightOnlyConfig):
    """int8 activations per token, ranged at run time, times weights of 2 to 8 bits."""

    weight_granularity: Granularity = field(default_factory=lambda: PerGroup(32))
    dynamic: ClassVar[bool] = True

    def weight(self) -> QuantSpec:
        """Symmetric integers."""
        return QuantSpec.parse(f"int{bits_of(self.weight_dtype)}[{block_text(self.weight_granularity)}]")


def bits_of(dtype: Any) -> int:
    """Bits of an integer dtype of torch.

    Raises:
        InputError: on anything else.
    """
    bits = _BITS.get(dtype)
    if bits is None or bits < 2:
        raise InputError(f"{dtype} is no integer of 2 to 8 bits", hint="torch.int2 ... torch.int8.")
    return bits


def is_linear(module: nn.Module, name: str) -> bool:
    """The default filter."""
    return isinstance(module, nn.Linear)


def chosen(model: nn.Module, filter_fn: Filter | None) -> list[str]:
    """Paths of the linear layers that a filter wants; a filter of its own may also name tables.

    Raises:
        NothingQuantized: if it wants none.
    """
    wanted = filter_fn or is_linear
    names = [name for name, module in model.named_modules() if wanted(module, name)]
    names = [n for n in names if isinstance(model.get_submodule(n), nn.Linear | nn.Embedding)]
    if not names:
        linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
        raise NothingQuantized(
            "the filter matches no linear layer", site=type(model).__name__,
            hint=f"The model has: {', '.join(linear[:20]) or 'none that is not quantized yet'}.",
        )  # fmt: skip
    return names


def quantize_(model: nn.Module, config: Any, filter_fn: Filter | None = None, device: Any = None) -> None:
    """Quantize the linear layers of a model in place, by a configuration; no data are needed.

    The model's forward and state dict then hold plain tensors and integer layers; call it again with another filter to
    treat other layers differently.

    Args:
        model: changed in place.
        config: one of this package's configurations, or a function of torchao's old style such as `int8_weight_only()`.
        filter_fn: (module, path) -> whether to quantize it; linear layers by default.
        device: where to move the model first.

    Raises:
        NothingQuantized: if nothing matches.
        PennyweightError: if `config` is none of ours.
    """
    if device is not None:
        model.to(device)
    apply = getattr(config, "apply_to", None)
    if apply is not None:  # training configurations
        apply(model, filter_fn)
        return
    if not isinstance(config, AOBaseConfig):
        raise PennyweightError(
            f"{type(config).__name__} is no configuration of this package",
            hint="Import configurations from pennyweight.compat.torchao.quantization.",
        )
    types = ("Linear",) if config.dynamic else ("Linear", "Embedding")
    prepared = pipeline.prepare(model, None, config.recipe(chosen(model, filter_fn), types))
    pipeline.graft(model, pipeline.convert(pipeline.calibrate(prepared, (), progress=False)))


def int8_weight_only(group_size: int | None = None, **_: Any) -> Int8WeightOnlyConfig:
    """Old spelling."""
    return Int8WeightOnlyConfig(group_size)


def int4_weight_only(group_size: int = 128, **_: Any) -> Int4WeightOnlyConfig:
    """Old spelling."""
    return Int4WeightOnlyConfig(group_size)


def int8_dynamic_activation_int8_weight(**_: Any) -> Int8DynamicActivationInt8WeightConfig:
    """Old spelling."""
    return Int8DynamicActivationInt8WeightConfig()


def int8_dynamic_activation_int4_weight(
    group_size: int = 32, **_: Any
) -> Int8DynamicActivationInt4WeightConfig:
    """Old spelling."""
    return Int8DynamicActivationInt4WeightConfig(group_size)

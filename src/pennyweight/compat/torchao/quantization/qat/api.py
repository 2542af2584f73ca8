"""The quantizers of torchao's `quantization.qat`: prepare in place, train, convert in place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from pennyweight import pipeline, training
from pennyweight.compat.torchao.quantization.quant_api import (
    Int4WeightOnlyConfig,
    Int8DynamicActivationInt4WeightConfig,
)
from pennyweight.nn.fake import Quantizer
from pennyweight.passes.solve import Solve
from pennyweight.plan import Rule
from pennyweight.recipe import Recipe
from pennyweight.spec import QuantSpec


class TwoStepQuantizer:
    """`prepare(model)` makes it train with rounding, `convert(model)` makes it integer; both in place."""

    def rules(self) -> tuple[Rule, ...]:
        """What is trained how."""
        raise NotImplementedError

    def prepare(self, model: nn.Module) -> nn.Module:
        """Swap the layers for trainable twins that share their parameters; returns the model given.

        Raises:
            NothingQuantized: if it has no such layer.
        """
        recipe = Recipe(type(self).__name__, self.rules(), (Solve("rtn", "minmax"),))
        made = training.prepare(model, None, recipe, weight="clipped", input="clipped")
        return pipeline.graft(model, made)

    def convert(self, model: nn.Module) -> nn.Module:
        """Integer layers with the codes as trained; returns the model given.

        Raises:
            PennyweightError: if it was not prepared.
        """
        return pipeline.graft(model, pipeline.convert(model))


class Int8DynActInt4WeightQATQuantizer(TwoStepQuantizer):
    """int8 activations per token, ranged at run time; int4 weights in groups (8da4w).

    Args:
        groupsize: inputs of a row that share a scale; rows that it does not divide have one scale.
        padding_allowed: accepted; such rows are handled either way.
        precision: accepted; the model's own is kept.
        scales_precision: accepted; scales are float32.
    """

    def __init__(
        self,
        groupsize: int = 256,
        padding_allowed: bool = False,
        precision: torch.dtype = torch.float32,
        scales_precision: torch.dtype = torch.float32,
    ) -> None:
        self.groupsize, self.padding_allowed = groupsize, padding_allowed
        self.precision, self.scales_precision = precision, scales_precision

    def rules(self) -> tuple[Rule, ...]:
        """Every linear layer."""
        return Int8DynamicActivationInt4WeightConfig(self.groupsize).rules()


class Int4WeightOnlyQATQuantizer(TwoStepQuantizer):
    """int4 weights in groups, asymmetric; float activations.

    Args:
        groupsize: inputs of a row that share scale and zero point.
        inner_k_tiles: accepted; a layout of other machines.
        precision: accepted.
        scales_precision: accepted.
    """

    def __init__(
        self,
        groupsize: int = 256,
        inner_k_tiles: int | None = 8,
        precision: torch.dtype = torch.float32,
        scales_precision: torch.dtype = torch.float32,
    ) -> None:
        self.groupsize, self.inner_k_tiles = groupsize, inner_k_tiles
        self.precision, self.scales_precision = precision, scales_precision

    def rules(self) -> tuple[Rule, ...]:
        """Every linear layer."""
        return Int4WeightOnlyConfig(self.groupsize).rules()


class Int4WeightOnlyEmbeddingQATQuantizer(TwoStepQuantizer):
    """Tables of int4 rows in groups.

    Args:
        group_size: columns of a row that share a scale.
        scale_precision: accepted; scales are float32.
        zero_point_precision: accepted; there are none.
    """

    def __init__(
        self,
        group_size: int = 256,
        scale_precision: torch.dtype = torch.float32,
        zero_point_precision: torch.dtype = torch.int32,
    ) -> None:
        self.group_size = group_size
        self.scale_precision, self.zero_point_precision = scale_precision, zero_point_precision

    def rules(self) -> tuple[Rule, ...]:
        """Every table."""
        grouped, row = QuantSpec.parse(f"int4[{self.group_size}]"), QuantSpec.parse("int4[1,*]")
        return (
            Rule(types=("Embedding",), weight=grouped, fitting=True, optional=True),
            Rule(types=("Embedding",), weight=row, optional=True),
        )


class ComposableQATQuantizer(TwoStepQuantizer):
    """Several quantizers as one, for linear layers and tables.

    Args:
        quantizers: the first whose rules match a layer decides.
    """

    def __init__(self, quantizers: Sequence[TwoStepQuantizer]) -> None:
        self.quantizers = list(quantizers)

    def rules(self) -> tuple[Rule, ...]:
        """All of them, in order."""
        return tuple(rule for quantizer in self.quantizers for rule in quantizer.rules())


def _switch(module: nn.Module, on: bool) -> None:
    if isinstance(module, Quantizer):
        module.active = on


def enable_8da4w_fake_quant(mod: nn.Module) -> None:
    """For `model.apply`: round from now on."""
    _switch(mod, True)


def disable_8da4w_fake_quant(mod: nn.Module) -> None:
    """For `model.apply`: compute in float, for the first steps of training."""
    _switch(mod, False)


def enable_4w_fake_quant(mod: nn.Module) -> None:
    """For `model.apply`: round from now on."""
    _switch(mod, True)


def disable_4w_fake_quant(mod: nn.Module) -> None:
    """For `model.apply`: compute in float, for the first steps of training."""
    _switch(mod, False)

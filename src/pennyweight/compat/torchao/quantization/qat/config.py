"""Configurations of `quantize_` that prepare for training and convert after it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from torch import nn

from pennyweight import pipeline, training
from pennyweight.compat.torchao.quantization.granularity import Granularity, PerGroup, PerToken, block_text
from pennyweight.compat.torchao.quantization.quant_api import TOKENS, AOBaseConfig, Filter, bits_of, chosen
from pennyweight.errors import InputError, PennyweightError
from pennyweight.passes.solve import Solve
from pennyweight.plan import Rule
from pennyweight.recipe import Recipe
from pennyweight.spec import QuantSpec


class QATStep(StrEnum):
    """Before or after training."""

    PREPARE = "prepare"
    CONVERT = "convert"


class IntxFakeQuantizeConfig:
    """How one operand is rounded in training.

    Args:
        dtype: torch.int2 ... torch.int8.
        granularity: an object of this package, or "per_token", "per_channel", "per_group", "per_tensor".
        mapping_type: accepted; `is_symmetric` decides.
        scale_precision: accepted; scales are float32.
        zero_point_precision: accepted.
        zero_point_domain: accepted.
        is_dynamic: activations must be ranged at run time.
        range_learning: whether weights learn their scales.
        group_size: of "per_group".
        is_symmetric: whether there is no zero point.

    Raises:
        InputError: on other values.
    """

    def __init__(
        self,
        dtype: Any,
        granularity: Granularity | str | None = None,
        mapping_type: Any = None,
        scale_precision: torch.dtype = torch.float32,
        zero_point_precision: torch.dtype = torch.int32,
        zero_point_domain: Any = None,
        is_dynamic: bool = True,
        range_learning: bool = False,
        eps: float | None = None,
        *,
        group_size: int | None = None,
        is_symmetric: bool | None = None,
    ) -> None:
        self.bits = bits_of(dtype)
        self.granularity = _granularity(granularity, group_size)
        self.is_dynamic, self.range_learning = is_dynamic, range_learning
        self.is_symmetric = is_symmetric is not False

    def weight(self) -> QuantSpec:
        """As the spec of a weight."""
        zero, grid = ("", "int") if self.is_symmetric else ("+z", "uint")
        return QuantSpec.parse(f"{grid}{self.bits}[{block_text(self.granularity)}]{zero}")


FakeQuantizeConfig = IntxFakeQuantizeConfig


def _granularity(given: Granularity | str | None, group_size: int | None) -> Granularity:
    from pennyweight.compat.torchao.quantization.granularity import PerRow, PerTensor

    if isinstance(given, Granularity):
        return given
    if given is None or given == "per_group":
        return PerGroup(group_size or 32)
    named: dict[str, Granularity] = {
        "per_token": PerToken(), "per_channel": PerRow(), "per_row": PerRow(), "per_tensor": PerTensor(),
    }  # fmt: skip
    if given not in named:
        raise InputError(f"granularity {given!r}", hint=f"One of {', '.join(named)}, per_group.")
    return named[given]


@dataclass
class QATConfig:
    """`quantize_(model, QATConfig(base, step="prepare"))`, train, `quantize_(model, QATConfig(base, step="convert"))`.

    Args:
        base_config: the configuration to train for.
        activation_config: in its stead, how activations are rounded; int8 per token is what runs.
        weight_config: and weights.
        step: "prepare" or "convert".
    """

    base_config: AOBaseConfig | None = None
    activation_config: IntxFakeQuantizeConfig | None = None
    weight_config: IntxFakeQuantizeConfig | None = None
    step: str = "prepare"

    def __post_init__(self) -> None:
        self.step = QATStep(str(getattr(self.step, "value", self.step))).value
        if self.base_config is not None and (self.activation_config or self.weight_config):
            raise InputError(
                "give either base_config or the configurations of the operands", site="QATConfig"
            )

    def apply_to(self, model: nn.Module, filter_fn: Filter | None) -> None:
        """What `quantize_` does with it.

        Raises:
            NothingQuantized: if nothing matches.
            PennyweightError: on convert without prepare.
        """
        if self.step == "convert":
            pipeline.graft(model, pipeline.convert(model))
            return
        names = chosen(model, filter_fn)
        recipe = Recipe("qat", self._rules(names), (Solve("rtn", "minmax"),))
        learned = self.weight_config is not None and self.weight_config.range_learning
        made = training.prepare(model, None, recipe, weight="lsq" if learned else "clipped", input="clipped")
        pipeline.graft(model, made)

    def _rules(self, names: list[str]) -> tuple[Rule, ...]:
        if self.base_config is not None:
            types = ("Linear",) if self.base_config.dynamic else ("Linear", "Embedding")
            return self.base_config.rules(names, types)
        if self.weight_config is None:
            raise InputError("there is nothing to train for", site="QATConfig", hint="Give base_config.")
        tokens = None
        if self.activation_config is not None:
            if self.activation_config.bits != 8 or not isinstance(
                self.activation_config.granularity, PerToken
            ):
                raise PennyweightError(
                    "activations are rounded to int8 per token here",
                    hint="IntxFakeQuantizeConfig(torch.int8, 'per_token', is_symmetric=False), or pw.training.prepare "
                    "with calibrated grids.",
                )
            tokens = QuantSpec.parse(TOKENS)
        weight = self.weight_config.weight()
        types = ("Linear",) if tokens else ("Linear", "Embedding")
        return tuple(Rule(n, types, weight=weight, input=tokens, dynamic=tokens is not None) for n in names)


class IntXQuantizationAwareTrainingConfig(QATConfig):
    """Old spelling of `QATConfig(step="prepare")`."""

    def __init__(
        self,
        activation_config: IntxFakeQuantizeConfig | None = None,
        weight_config: IntxFakeQuantizeConfig | None = None,
    ) -> None:
        super().__init__(None, activation_config, weight_config, "prepare")


class FromIntXQuantizationAwareTrainingConfig(QATConfig):
    """Old spelling of `QATConfig(step="convert")`."""

    def __init__(self) -> None:
        super().__init__(step="convert")


intx_quantization_aware_training = IntXQuantizationAwareTrainingConfig
from_intx_quantization_aware_training = FromIntXQuantizationAwareTrainingConfig

"""The weight that a twin computes with: as trained, as solved, or as it is."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from pennyweight.nn.fake import WeightQuantizer

ROUNDING = "rounding"  # child of a twin that trains: ModuleDict from the weight's name to its quantizer


def trained(twin: nn.Module) -> dict[str, WeightQuantizer]:
    """Quantizers of the weights of a twin that trains, by the weights' names."""
    found = twin._modules.get(ROUNDING)
    children = cast("nn.ModuleDict", found).values() if found is not None else ()
    return {cast("WeightQuantizer", q).site.rpartition(":")[2]: cast("WeightQuantizer", q) for q in children}


def train_weight(twin: nn.Module, name: str, quantizer: WeightQuantizer) -> None:
    """Let a twin round one of its weights in training."""
    if ROUNDING not in twin._modules:
        twin.add_module(ROUNDING, nn.ModuleDict())
    cast("nn.ModuleDict", twin._modules[ROUNDING])[name.replace(".", "/")] = quantizer


def rounded(twin: Any, name: str, matrix: Tensor) -> Tensor:
    """A weight's matrix view, [out, in]: rounded in training, decoded from its codes once solved, else as it is."""
    children = twin._modules.get(ROUNDING)
    if children is not None:
        key = name.replace(".", "/")
        return children[key](matrix) if key in children else matrix
    if name in twin.solved:
        solved: Tensor = twin.solved[name].dequantize()
        return solved
    return matrix

"""Passes: frozen dataclasses of hyper-parameters that change a model and say what they did. One file per pass.

A pass has a stage: "float" passes rewrite the float model before it is planned, "calibrate" passes read statistics,
"solve" passes find codes, in the order of the recipe within each stage. A "train" pass makes the planned model
trainable; with one, batch norms stay alive until the model is converted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

from torch import nn

from pennyweight.graph import Graph
from pennyweight.journal import Journal
from pennyweight.plan import Plan
from pennyweight.registry import Registry

Stage = Literal["float", "train", "calibrate", "solve"]


@dataclass
class Context:
    """What passes work on.

    Attributes:
        model: the clone being quantized; float passes may replace its modules, never those of the user's model.
        graph: dataflow of the model as it now is; call `rerecord` after a change that later passes must see.
        plan: empty before the model is planned.
        journal: where to say what was done.
        batches: makes a fresh iterator over the calibration batches.
        seed: of everything random.
    """

    model: nn.Module
    graph: Graph
    journal: Journal
    plan: Plan = field(default_factory=lambda: Plan({}, (), {}))
    batches: Callable[[], Iterable[Any]] | None = None
    seed: int = 0
    rerecord: Callable[[], Graph] | None = None


class Pass(Protocol):
    """One step of a recipe.

    Attributes:
        stage: see the module.
        preserves_output: whether a float model computes the same after the pass.
    """

    stage: ClassVar[Stage]
    preserves_output: ClassVar[bool]

    def needs(self) -> set[str]:
        """Statistics of the activations that must be collected."""
        ...

    def run(self, context: Context) -> None:
        """Do it, and journal it."""
        ...


passes: Registry[type[Pass]] = Registry("passes", "pennyweight.passes")


def replace_module(root: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` wherever `old` stands in the tree."""
    for parent in list(root.modules()):
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new

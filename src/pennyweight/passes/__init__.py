"""Passes: frozen dataclasses of hyper-parameters that change a model and say what they did. One file per pass.

A pass has a stage: "float" passes rewrite the float model before it is planned, "adapt" passes rewrite the planned
one by what the data or the folded norms say of it, before anything is ranged, "calibrate" passes read statistics,
"solve" passes find codes, in the order of the recipe within each stage. A "train" pass makes the planned model
trainable; with one, batch norms stay alive until the model is converted.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

from torch import Tensor, nn

from pennyweight.graph import Graph
from pennyweight.journal import Journal
from pennyweight.plan import Plan
from pennyweight.registry import Registry

Stage = Literal["float", "train", "adapt", "calibrate", "solve"]


class Normal(NamedTuple):
    """Mean and standard deviation of every channel of a tensor, float64 [channels]."""

    mean: Tensor
    deviation: Tensor


@dataclass
class Context:
    """What passes work on.

    Attributes:
        model: the clone being quantized; float passes may replace its modules, never those of the user's model.
        graph: dataflow of the model as it now is; call `rerecord` after a change that later passes must see.
        plan: empty before the model is planned.
        journal: where to say what was done.
        batches: the calibration batches; may be called again by passes that say so (`replays`).
        seed: of everything random.
        rerecord: records the model as it now is.
        outputs: of layers that a batch norm was folded into, what the norm says of their outputs.
        progress: whether bars may be shown.
        checkpoint: folder for what takes long to find, if there is one.
    """

    model: nn.Module
    graph: Graph
    journal: Journal
    plan: Plan = field(default_factory=lambda: Plan({}, (), {}))
    batches: Callable[[], Iterable[Any]] | None = None
    seed: int = 0
    rerecord: Callable[[], Graph] | None = None
    outputs: dict[str, Normal] = field(default_factory=dict)
    progress: bool = False
    checkpoint: Path | None = None

    def inputs(self) -> Iterable[Any]:
        """The calibration batches, from the first one on; none where there are none."""
        return () if self.batches is None else self.batches()


class Pass(Protocol):
    """One step of a recipe.

    Attributes:
        stage: see the module.
        preserves_output: whether a float model computes the same after the pass.

    Two more, if they are there and true: `replays`, for a pass that reads `Context.batches`, and `data_free`, for one
    that can do without any, so that the example may stand in for them.
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


def parameter_like(old: Tensor, new: Tensor) -> nn.Parameter:
    """Another parameter of the kind of `old`: the user's own stays as it is."""
    return nn.Parameter(new.to(old.dtype), requires_grad=old.requires_grad)


def clone(model: nn.Module) -> nn.Module:
    """Copy the module tree, share the parameters."""
    copied = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    for old, new in zip(model.modules(), copied.modules(), strict=True):
        for hooks in ("_forward_pre_hooks", "_forward_hooks", "_forward_hooks_always_called"):
            if getattr(old, hooks) and not getattr(new, hooks):  # an fx.GraphModule loses them
                getattr(new, hooks).update(getattr(old, hooks))
    return copied

"""`capture_pre_autograd_graph` and `export_for_training`, which torch took away, over today's `torch.export.export`.

Every other name of `torch.export` is found here too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

EXAMPLE = "pennyweight.example"  # in the meta of a graph module: the (args, kwargs) that it was made with


def capture_pre_autograd_graph(
    f: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
    dynamic_shapes: Any = None,
) -> fx.GraphModule:
    """The model as a callable graph of aten functions, in the mode that it is in, sharing its parameters.

    Args:
        f: the model.
        args: one batch of positional arguments.
        kwargs: keyword arguments.
        dynamic_shapes: sizes that may vary, as `torch.export.export` takes them.
    """
    program = export_for_training(f, args, kwargs, dynamic_shapes=dynamic_shapes)
    graph_module: fx.GraphModule = program.module()
    graph_module.meta[EXAMPLE] = (tuple(args), dict(kwargs or {}))
    return graph_module


def export_for_training(
    mod: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    strict: bool = True,
    preserve_module_call_signature: tuple[str, ...] = (),
) -> torch.export.ExportedProgram:
    """What `torch.export.export` gives today: functions before autograd took them apart; `.module()` is callable.

    Args:
        mod: the model, in the mode that is wanted: batch norm and dropout are exported as they are.
        args: one batch of positional arguments.
        kwargs: keyword arguments.
        dynamic_shapes: sizes that may vary.
        strict: read the bytecode, as this function always did; its nodes also say which source call they came from.
        preserve_module_call_signature: see `torch.export.export`.
    """
    return torch.export.export(
        mod,
        args,
        kwargs,
        dynamic_shapes=dynamic_shapes,
        strict=strict,
        preserve_module_call_signature=preserve_module_call_signature,
    )


def __getattr__(name: str) -> Any:
    """Everything else is torch's own."""
    return getattr(torch.export, name)

"""Scales that move from a layer's inputs into whatever makes them: found by trying, never by name.

`W x = (W diag(s)) (x / s)`: the division goes into the norm whose output x is, or into the rows of a linear layer that
x is proportional to. Whether it may is seen by comparing the block's output before and after.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pennyweight.llm.block import Group, Run

CLOSE = 1e-4  # of the block's change of its input: what rounding of float32 may do


@dataclass(frozen=True)
class Producer:
    """What makes a group's input.

    Attributes:
        path: of the module in the block.
        kind: "norm" whose weight is a factor, "norm1" whose weight plus one is, "linear".
    """

    path: str
    kind: str


def scale_producer(block: nn.Module, producer: Producer, factor: Tensor) -> None:
    """Multiply what the producer makes by `factor`, [n]."""
    module = block.get_submodule(producer.path)
    weight = module.get_parameter("weight")
    if producer.kind == "norm1":
        scaled = (weight + 1.0) * factor - 1.0
    else:
        scaled = weight * (factor if weight.ndim == 1 else factor[:, None])
    module._parameters["weight"] = nn.Parameter(scaled, requires_grad=False)
    bias = module._parameters.get("bias")
    if bias is not None:
        module._parameters["bias"] = nn.Parameter(bias * factor, requires_grad=False)


def scale_group(block: nn.Module, names: list[str], factor: Tensor) -> None:
    """Multiply the columns of a group's weights by `factor`, [n]."""
    for name in names:
        layer = block.get_submodule(name)
        weight = layer.get_parameter("weight")
        layer._parameters["weight"] = nn.Parameter(weight * factor, requires_grad=False)


def makers(block: nn.Module, run: Run, hidden: Tensor, group: Group) -> list[Producer]:
    """Modules that may make a group's input: the one whose output it is, else linear layers of as many outputs."""
    outputs: list[tuple[str, Tensor]] = []
    found: list[Tensor] = []
    handles = []

    def after(path: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: object, y: object) -> None:
            if isinstance(y, Tensor) and not found:
                outputs.append((path, y))

        return keep

    def before(module: nn.Module, args: tuple[Tensor]) -> None:
        found.append(args[0])

    for path, module in block.named_modules():
        if path and module._parameters.get("weight") is not None:
            handles.append(module.register_forward_hook(after(path)))
    handles.append(block.get_submodule(group.names[0]).register_forward_pre_hook(before))
    try:
        with torch.no_grad():
            run(block, hidden)
    finally:
        for handle in handles:
            handle.remove()
    if not found:
        return []
    x, width = found[0], found[0].shape[-1]
    choices: list[Producer] = []
    for path, y in reversed(outputs):
        weight = block.get_submodule(path).get_parameter("weight")
        if weight.shape[0] != width or y.shape[-1] != width:
            continue
        if weight.ndim == 1 and y.data_ptr() == x.data_ptr() and y.numel() == x.numel():
            choices = [Producer(path, "norm"), Producer(path, "norm1"), *choices]
        elif (
            weight.ndim == 2 and isinstance(block.get_submodule(path), nn.Linear) and path not in group.names
        ):
            choices.append(Producer(path, "linear"))
    return choices


def find_producer(block: nn.Module, run: Run, hidden: Tensor, group: Group) -> Producer | None:
    """The module into which any scaling of a group's inputs can go without changing what the block computes.

    Tried with random scales on these hidden states; the block is as it was afterwards.
    """
    want = run(block, hidden)
    size = float((want - hidden).pow(2).mean())
    width = block.get_submodule(group.names[0]).get_parameter("weight").shape[1]
    scale = torch.rand(width, generator=torch.Generator().manual_seed(0)) + 0.5
    for producer in makers(block, run, hidden, group):
        touched = [*group.names, producer.path]
        kept = {p: dict(block.get_submodule(p)._parameters) for p in touched}
        scale_producer(block, producer, 1.0 / scale)
        scale_group(block, group.names, scale)
        apart = float((run(block, hidden) - want).pow(2).mean())
        for path, parameters in kept.items():
            block.get_submodule(path)._parameters.update(parameters)
        if apart <= CLOSE**2 * size:
            return producer
    return None

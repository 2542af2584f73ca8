"""AutoRound: the roundings and ranges of a whole block, trained by the error of its output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from pennyweight.llm.block import Run, Streams, round_tokens, turned_by
from pennyweight.llm.online import TurnsInputs
from pennyweight.llm.schemes import Scheme, bits_of
from pennyweight.llm.skeleton import put_module
from pennyweight.llm.store import Solved
from pennyweight.nn.linear import LinearTwin
from pennyweight.qtensor import QTensor
from pennyweight.reconstruction.blocks import Unit
from pennyweight.reconstruction.optimize import Block, Settings, reconstruct
from pennyweight.reconstruction.samples import Samples

ROUNDS = 8


@dataclass(frozen=True)
class Training:
    """How long and how far.

    Args:
        steps: of Adam.
        windows: of a step.
        rate: of weights in steps of their grid, a tenth of it for logarithms of scales; `0.2 / steps` where nothing
            is said, three times that for 2 bits. It is that of the first of ROUNDS, see `Settings.rounds`: what gains
            most is 30 times as much in one model as in another.
        seed: of the order of windows.
    """

    steps: int = 200
    windows: int = 8
    rate: float = 0.0
    seed: int = 0

    def size(self, bits: int) -> float:
        """Of the first step."""
        return self.rate or (0.6 if bits < 3 else 0.2) / self.steps


class _Run(nn.Module):
    """A block as a module of its hidden states alone. [windows, length, width] -> the same."""

    def __init__(self, block: nn.Module, run: Run) -> None:
        super().__init__()
        self.block, self.run = block, run

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return self.run(self.block, x)


class _TurnedTwin(TurnsInputs, LinearTwin):
    """The twin of a layer whose inputs are turned."""


def _twin(name: str, layer: nn.Linear, scheme: Scheme) -> LinearTwin:
    size = turned_by(layer)
    twin: Any = (_TurnedTwin if size else LinearTwin)(layer, scheme.layer(name))
    if size:
        twin.hadamard = size
    return cast(LinearTwin, twin)


def autoround(
    block: nn.Module,
    streams: Streams,
    starts: dict[str, Solved],
    schemes: dict[str, Scheme],
    targets: Tensor,
    training: Training,
) -> tuple[dict[str, QTensor], float, float]:
    """Minimise `|block'(x) - y|^2` over the hidden states, from given codes, by the loop of `reconstruction`.

    What is learned of every layer: `FreeRounding`. A round without gain is taken back. From GPTQ's codes signed steps,
    those of the paper, find nothing better; from nearest rounding, as there, they end behind GPTQ where tokens are few.

    Args:
        block: with its float weights; left as it is.
        streams: what enters the block.
        starts: codes to start from, by layer, on grids of integers; and how calibrated inputs are rounded.
        schemes: of the layers; activations are rounded as they say.
        targets: what should leave the block, [windows, length, width].
        training: see there.

    Returns:
        Codes by layer, the loss before and the loss after: squared errors summed over the width.

    Source: Cheng et al. 2023 (arXiv:2309.05516), algorithm 1; steps are those of Hubara et al. 2021 (arXiv:2006.10518).
    """
    layers = {n: block.get_submodule(n) for n in starts}
    doubles: dict[str, Any] = {n: _twin(n, cast(nn.Linear, m), schemes[n]) for n, m in layers.items()}
    for name, twin in doubles.items():
        twin.solved["weight"] = starts[name].weight
    least = min(bits_of(s.weight.spec) for s in starts.values())
    size = len(streams.batches[0])
    settings = Settings(
        training.steps, min(training.windows, size), training.size(least), pressure=0.0, warmup=1.0,
        drop=0.0, steps=False, biases=False, rounding="free", rounds=ROUNDS,
    )  # fmt: skip
    hidden = streams.whole()
    every = Samples([hidden], [True], len(hidden), False, tree_flatten(((hidden,), {}))[1])
    weights = [(t, "weight", t.weight.detach()) for t in doubles.values()]
    unit = Block(Unit("", tuple(starts)), _Run(block, streams.run), weights, every, targets, chunk=size)
    for name, twin in doubles.items():
        put_module(block, name, twin)
    handles = _rounded_inputs(block, schemes, starts)
    try:
        first, last = reconstruct(unit, settings, training.seed, lambda: None)
    finally:
        for handle in handles:
            handle.remove()
        for name, layer in layers.items():
            put_module(block, name, layer)
    return {n: t.solved["weight"] for n, t in doubles.items()}, first, last


def _rounded_inputs(
    block: nn.Module, schemes: dict[str, Scheme], starts: dict[str, Solved]
) -> list[torch.utils.hooks.RemovableHandle]:
    """Round the inputs of layers, with the gradient of the identity."""

    def hook(name: str) -> Callable[..., tuple[Tensor]]:
        def rounded(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
            x = round_tokens(args[0].detach(), schemes[name], starts[name].input)
            return (args[0] + (x - args[0]).detach(),)

        return rounded

    return [
        block.get_submodule(name).register_forward_pre_hook(hook(name))
        for name in starts
        if schemes[name].input is not None
    ]

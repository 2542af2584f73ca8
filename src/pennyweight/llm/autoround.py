"""AutoRound: the roundings and ranges of a whole block, trained by the signs of gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from pennyweight.formats import grids
from pennyweight.formats.integer import Integer
from pennyweight.llm.block import Streams, round_tokens
from pennyweight.llm.schemes import Scheme
from pennyweight.qtensor import QParams, QTensor, blocked, quantize, unblocked_param


@dataclass(frozen=True)
class Training:
    """How long and how far.

    Args:
        steps: of signed gradient descent.
        windows: of a step.
        rate: of a step; `1 / steps` where nothing is said, twice that below 4 bits from 1000 steps on. It falls
            to 0 in a line.
        seed: of the order of windows.
    """

    steps: int = 200
    windows: int = 8
    rate: float = 0.0
    seed: int = 0

    def size(self, bits: int) -> float:
        """Of the first step."""
        return self.rate or (2.0 if bits < 4 and self.steps >= 1000 else 1.0) / self.steps


class _Rounding:
    """A layer's weight as a function of what is trained.

        w' = s' (clamp(rint(w / s' + z) + ..., qmin, qmax) - z),  s' = a s,   rint(w / s' + z + V), V in [-1/2, 1/2]

    Attributes:
        shift: V, [out, in].
        stretch: a, one for every block, in [1/2, 3/2].
    """

    def __init__(self, weight: Tensor, start: QTensor) -> None:
        grid = grids[start.spec.grid]
        assert isinstance(grid, Integer)
        self.weight, self.spec, self.low, self.high = weight, start.spec, grid.qmin, grid.qmax
        self.scale = start.scales()
        self.zero = None if start.zero is None else start.zero.float()
        self.shift = torch.zeros_like(weight, requires_grad=True)
        self.stretch = torch.ones_like(self.scale, requires_grad=True)
        self.bits = grid.bits

    def weights(self) -> Tensor:
        """[out, in], with the gradient of the identity through the rounding."""
        shape = tuple(self.weight.shape)
        scale = unblocked_param(self.scale * self.stretch, shape)
        zero = 0.0 if self.zero is None else unblocked_param(self.zero, shape)
        blocks, shift = (blocked(t, tuple(self.scale.shape)) for t in (self.weight, self.shift))
        t = blocks / scale + shift
        q = t + (torch.round(t) - t).detach() + zero
        return ((q.clamp(self.low, self.high) - zero) * scale).reshape(shape)

    def solved(self, shift: Tensor, stretch: Tensor) -> QTensor:
        """The codes under stored scales."""
        scale = self.scale * stretch
        stored = quantize(self.weight, self.spec, QParams(scale, self.zero))
        shape = tuple(self.weight.shape)
        zero = 0.0 if self.zero is None else unblocked_param(self.zero, shape)
        parts = (blocked(t, tuple(self.scale.shape)) for t in (self.weight, shift))
        weight, move = parts
        t = torch.round(weight / unblocked_param(stored.scales(), shape) + move) + zero
        codes = t.clamp(self.low, self.high).reshape(shape).to(stored.codes.dtype)
        return QTensor(codes, stored.scale, stored.zero, self.spec)


def autoround(
    block: nn.Module,
    streams: Streams,
    starts: dict[str, QTensor],
    schemes: dict[str, Scheme],
    targets: list[Tensor],
    training: Training,
) -> tuple[dict[str, QTensor], float, float]:
    """Minimise `|block'(x) - y|^2` over the hidden states, from given codes.

    `V -= rate sign(dV)`, clipped to [-1/2, 1/2]; the same for the stretch of every scale, in [1/2, 3/2]. The best step
    by the loss of its windows, checked on all of them, is kept, or the start where nothing was better.

    Args:
        block: with its float weights; left as it is.
        streams: what enters the block.
        starts: codes to start from, by layer; on grids of integers.
        schemes: of the layers; activations are rounded as they say.
        targets: what should leave the block, one for each batch.
        training: see there.

    Returns:
        Codes by layer, the loss before and the loss after.

    Source: Cheng et al. 2023 (arXiv:2309.05516), equations 3 to 5 and algorithm 1; the stretch of a searched scale
    stands for the trained ends of the range.
    """
    roundings = {
        n: _Rounding(block.get_submodule(n).get_parameter("weight").detach(), q) for n, q in starts.items()
    }
    rate = training.size(min(r.bits for r in roundings.values()))
    order = torch.Generator().manual_seed(training.seed)
    rows = [(b, i) for b, batch in enumerate(streams.batches) for i in range(len(batch))]
    size = min(training.windows, len(streams.batches[0]))
    handles = _rounded_inputs(block, schemes)

    def run(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        def call(module: nn.Module, *args: object, **kwargs: object) -> object:
            return functional_call(module, weights, args, kwargs)

        return streams.run(_Called(block, call), x)

    def loss_of(weights: dict[str, Tensor]) -> float:
        total, n = 0.0, 0
        for x, y in zip(streams.batches, targets, strict=True):
            total += float((run(weights, x) - y).pow(2).sum())
            n += y.numel()
        return total / n

    kept = {n: (torch.zeros_like(r.weight), torch.ones_like(r.scale)) for n, r in roundings.items()}
    try:
        with torch.no_grad():
            first = loss_of({f"{n}.weight": q.dequantize() for n, q in starts.items()})
        with torch.enable_grad():
            best = math.inf
            running = math.inf
            for step in range(training.steps):
                batch, _ = rows[int(torch.randint(len(rows), (), generator=order))]
                x, y = streams.batches[batch], targets[batch]
                if len(x) > size:
                    pick = torch.randperm(len(x), generator=order)[:size]
                    x, y = x[pick], y[pick]
                elif len(x) < len(streams.batches[0]):
                    continue
                weights = {f"{n}.weight": r.weights() for n, r in roundings.items()}
                value = (run(weights, x) - y).pow(2).mean()
                running = (
                    float(value.detach())
                    if running == math.inf
                    else 0.9 * running + 0.1 * float(value.detach())
                )
                if running < best and step > training.steps // 4:
                    best = running
                    kept = {
                        n: (r.shift.detach().clone(), r.stretch.detach().clone())
                        for n, r in roundings.items()
                    }
                value.backward()
                move = rate * (1.0 - step / training.steps)
                for r in roundings.values():
                    _signed(r.shift, move, -0.5, 0.5)
                    _signed(r.stretch, move, 0.5, 1.5)
        with torch.no_grad():
            final = {n: (r.shift.detach(), r.stretch.detach()) for n, r in roundings.items()}
            found, last = starts, first
            for choice in (kept, final):
                solved = {n: r.solved(*choice[n]) for n, r in roundings.items()}
                error = loss_of({f"{n}.weight": q.dequantize() for n, q in solved.items()})
                if error < last:
                    found, last = solved, error
    finally:
        for handle in handles:
            handle.remove()
    return found, first, last


class _Called(nn.Module):
    """A block called in another way; it is what `Streams.run` calls."""

    def __init__(self, block: nn.Module, call: Callable[..., object]) -> None:
        super().__init__()
        self.block, self.call = block, call

    def forward(self, *args: object, **kwargs: object) -> object:
        """See the class."""
        return self.call(self.block, *args, **kwargs)


def _signed(x: Tensor, move: float, low: float, high: float) -> None:
    with torch.no_grad():
        if x.grad is not None:
            x.sub_(torch.sign(x.grad), alpha=move).clamp_(low, high)
            x.grad = None


def _rounded_inputs(block: nn.Module, schemes: dict[str, Scheme]) -> list[torch.utils.hooks.RemovableHandle]:
    """Round the inputs of layers, with the gradient of the identity."""

    def hook(scheme: Scheme) -> Callable[..., tuple[Tensor]]:
        def rounded(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
            return (args[0] + (round_tokens(args[0].detach(), scheme) - args[0]).detach(),)

        return rounded

    return [
        block.get_submodule(name).register_forward_pre_hook(hook(scheme))
        for name, scheme in schemes.items()
        if scheme.input is not None and not scheme.static
    ]

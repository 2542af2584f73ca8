"""The loop that all reconstructions share: learn roundings so that a block's result is what it was in float."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pennyweight.nn.fake import ActivationQuantizer
from pennyweight.nn.rounding import ROUNDING
from pennyweight.nn.sites import routed
from pennyweight.reconstruction.blocks import Unit
from pennyweight.reconstruction.samples import Samples, first_tensor
from pennyweight.reconstruction.soften import SignRounding, SoftRounding, can_soften

CHECKED = 256  # samples on which a block is compared before and after


@dataclass(frozen=True, slots=True)
class Settings:
    """How a block is learned.

    Attributes:
        iterations, batch: steps, and samples drawn for each.
        rate: step of Adam for the roundings, in units of their logits.
        pressure: weight of `mean(1 - |2 h - 1|^beta)` beside the error, which is 1 for nearest rounding.
        warmup: share of the steps before that term counts; then beta falls from 20 to 2.
        drop: share of the values that stay unrounded in training, of inputs and at every activation inside.
        steps, biases: whether the scales of activations, and a shift of every bias, are learned too.
        rounding: "soft" (sigmoids) or "signs" (signed gradients).
    """

    iterations: int
    batch: int
    rate: float
    pressure: float
    warmup: float
    drop: float
    steps: bool
    biases: bool
    rounding: Literal["soft", "signs"]


@dataclass
class Block:
    """A unit with all that its reconstruction reads.

    Attributes:
        weights: (twin, name of the weight, matrix [out, in]) of each of its weights.
        samples: its inputs in the network as quantized so far.
        floats: its inputs in the float network, where they are mixed in.
        target: its results in the float network: samples first, or a list where sizes differ.
        importance: of the squared error of each value, like `target`; None for 1.
        ties: groups of the quantizers of its activations that share a scale; those not to be learned are left out.
    """

    unit: Unit
    module: nn.Module
    weights: list[tuple[Any, str, Tensor]]
    samples: Samples
    target: Tensor | list[Tensor]
    floats: Samples | None = None
    importance: Tensor | list[Tensor] | None = None
    ties: tuple[tuple[ActivationQuantizer, ...], ...] = ()

    def error(self, index: Tensor, share: float = 0.0) -> Tensor:
        """Squared error summed over channels, averaged over samples and places."""
        if share and self.floats is not None:
            args, kwargs = self.samples.mixed(self.floats, index, share)
        else:
            args, kwargs = self.samples.take(index)
        y = first_tensor(self.module(*args, **kwargs))
        wanted = self._of(self.target, index)
        y, wanted = (v.clamp(self.unit.low, self.unit.high) for v in (y, wanted))
        square = (y - wanted) ** 2
        if self.importance is not None:
            square = square * self._of(self.importance, index)
        channels = square.shape[1] if square.ndim == 4 else square.shape[-1]
        return square.mean() * channels

    def _of(self, values: Tensor | list[Tensor], index: Tensor) -> Tensor:
        return values[int(index[0])] if isinstance(values, list) else values[index]

    def measured(self) -> float:
        """The error of the weights as solved, over the first samples."""
        count = min(self.samples.count, CHECKED)
        size = 1 if self.samples.ragged else 64
        with torch.no_grad():
            parts = [
                float(self.error(torch.arange(i, min(i + size, count)))) * (min(i + size, count) - i)
                for i in range(0, count, size)
            ]
        return sum(parts) / count


def reconstruct(
    block: Block, settings: Settings, seed: int, tick: Callable[[], object]
) -> tuple[float, float]:
    """Learn the roundings of a block; returns its error before and after.

    Twins hold what was learned as their solved weights, quantizers their new scales. What does not lower the error over
    the first samples is taken back. The outcome depends on the seed and the block alone.

    Args:
        block: whose weights are solved, by rounding to nearest for instance.
        settings: see there.
        seed: of the mini-batches and of what is dropped.
        tick: called after every step.
    """
    with torch.random.fork_rng(devices=[]), routed(), torch.enable_grad():
        torch.manual_seed(seed)
        before = block.measured()
        kept = _State.of(block)
        _learn(block, settings, max(before, 1e-20), tick)
        after = block.measured()
        if not after < before:
            kept.restore()
            after = before
    return before, after


@dataclass
class _State:
    solved: list[tuple[Any, dict[str, Any], Tensor | None]]
    scales: list[tuple[ActivationQuantizer, Tensor]]

    @classmethod
    def of(cls, block: Block) -> _State:
        solved = [(t, dict(t.solved), getattr(t, "bias_shift", None)) for t, _, _ in block.weights]
        return cls(solved, [(q, q.scale) for group in block.ties for q in group])

    def restore(self) -> None:
        for twin, codes, shift in self.solved:
            twin.solved = codes
            if hasattr(twin, "bias_shift"):
                twin.bias_shift = shift
        for quantizer, scale in self.scales:
            quantizer.scale = scale


def _learn(block: Block, settings: Settings, unit: float, tick: Callable[[], object]) -> None:
    kind = SoftRounding if settings.rounding == "soft" else SignRounding
    learned = [(t, n, kind(w, t.solved[n])) for t, n, w in block.weights if can_soften(t.solved[n])]
    roundings = [r for _, _, r in learned]
    shifts = (
        [_Shift(t) for t in {id(t): t for t, _, _ in learned}.values() if _shiftable(t)]
        if settings.biases
        else []
    )
    steps = [_Step(group) for group in block.ties] if settings.steps else []
    beside: list[_Shift | _Step] = [*shifts, *steps]
    free = [*(r.logits for r in roundings), *(s.free for s in beside)]
    extra = [{"params": [s.free for s in shifts], "lr": settings.rate}] if shifts else []
    extra += [{"params": [s.free for s in steps], "lr": 0.1 * settings.rate}] if steps else []
    signs = settings.rounding == "signs"
    groups = [] if signs else [{"params": [r.logits for r in roundings], "lr": settings.rate}]
    optimizer = torch.optim.Adam(groups + extra) if groups + extra else None
    size = 1 if block.samples.ragged else min(settings.batch, block.samples.count)
    quantizers = [m for m in block.module.modules() if isinstance(m, ActivationQuantizer)]
    with _in_place(learned), _dropping(quantizers, settings.drop):
        for i in range(settings.iterations):
            for s in beside:
                s.apply()
            index = torch.randint(block.samples.count, (size,))
            loss = block.error(index, settings.drop) / unit
            power = _power(i / settings.iterations, settings.warmup)
            if power:
                loss = loss + settings.pressure * sum(r.undecided(power) for r in roundings) / len(roundings)
            for p, gradient in zip(free, torch.autograd.grad(loss, free, allow_unused=True), strict=True):
                p.grad = gradient
            if signs:
                _signed_step([r.logits for r in roundings], settings.rate * (1 - i / settings.iterations))
            if optimizer is not None:
                optimizer.step()
            tick()
    for twin, name, rounding in learned:
        twin.solved = {**twin.solved, name: rounding.codes()}
    for s in beside:
        s.apply()
        s.settle()


def _power(progress: float, warmup: float) -> float:
    """beta: 0 at first, then from 20 down to 2."""
    if progress < warmup:
        return 0.0
    return 2 + 18 * (1 - (progress - warmup) / max(1 - warmup, 1e-9))


def _signed_step(parameters: list[nn.Parameter], rate: float) -> None:
    with torch.no_grad():
        for p in parameters:
            if p.grad is not None:
                p.sub_(rate * p.grad.sign()).clamp_(-0.5, 0.5)


def _shiftable(twin: Any) -> bool:
    return "bias_shift" in getattr(twin, "_buffers", {})


class _Shift:
    """A learned shift of a layer's biases, in units of half the deviation that rounding errors give a sum."""

    def __init__(self, twin: Any) -> None:
        self.twin, self.start = twin, twin.bias_shift
        q = twin.solved["weight"]
        scale = q.scales().abs().reshape(q.scales().shape[0], -1).mean(1)
        rows, columns = q.codes.shape
        step = float(twin.input.scale) if twin.input is not None else 1.0
        self.unit = (scale * step * math.sqrt(columns)).expand(rows)
        self.free = nn.Parameter(torch.zeros(rows))

    def apply(self) -> None:
        shift = self.free * self.unit
        self.twin.bias_shift = shift if self.start is None else self.start + shift

    def settle(self) -> None:
        self.twin.bias_shift = self.twin.bias_shift.detach()


class _Step:
    """A learned scale of quantizers that share it, as a factor `exp(free)` on what was calibrated."""

    def __init__(self, group: tuple[ActivationQuantizer, ...]) -> None:
        self.group, self.start = group, group[0].scale.detach().clone()
        self.free = nn.Parameter(torch.zeros(()))

    def apply(self) -> None:
        scale = self.start * self.free.exp()
        for quantizer in self.group:
            quantizer.scale = scale

    def settle(self) -> None:
        for quantizer in self.group:
            quantizer.scale = quantizer.scale.detach().clone()


@contextmanager
def _in_place(learned: Sequence[tuple[Any, str, nn.Module]]) -> Iterator[None]:
    """Twins compute with these roundings."""
    twins = {id(t): t for t, _, _ in learned}
    for twin in twins.values():
        own = {n.replace(".", "/"): r for t, n, r in learned if t is twin}
        others = {n: _Solved(twin, n) for n in twin.solved if n.replace(".", "/") not in own}
        twin.add_module(
            ROUNDING, nn.ModuleDict({**own, **{n.replace(".", "/"): m for n, m in others.items()}})
        )
    try:
        yield
    finally:
        for twin in twins.values():
            del twin._modules[ROUNDING]


class _Solved(nn.Module):
    """A weight that is not learned beside one that is: as solved."""

    def __init__(self, twin: Any, name: str) -> None:
        super().__init__()
        self.value = twin.solved[name].dequantize()

    def forward(self, matrix: Tensor) -> Tensor:
        value: Tensor = self.value
        return value


@contextmanager
def _dropping(quantizers: list[ActivationQuantizer], share: float) -> Iterator[None]:
    """Quantizers leave a random share of the values as they are."""
    for quantizer in quantizers:
        quantizer.drop = share
    try:
        yield
    finally:
        for quantizer in quantizers:
            quantizer.drop = 0.0

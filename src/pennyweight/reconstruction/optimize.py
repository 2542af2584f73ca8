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
from pennyweight.qtensor import QTensor
from pennyweight.reconstruction.blocks import Unit
from pennyweight.reconstruction.samples import Samples, first_tensor
from pennyweight.reconstruction.soften import FreeRounding, SignRounding, SoftRounding, can_soften

Rounding = Literal["soft", "signs", "free"]
SLOWER = 1 / 3  # of the rate, after a round without gain
CHECKED = 256  # samples on which a block is compared before and after


@dataclass(frozen=True, slots=True)
class Settings:
    """How a block is learned.

    Attributes:
        iterations, batch: steps, and samples drawn for each.
        rate: step of Adam for the roundings, in units of their logits; of "free" weights in steps of their grid,
            falling to 0 over the iterations.
        pressure: weight of `mean(1 - |2 h - 1|^beta)` beside the error, which is 1 for nearest rounding.
        warmup: share of the steps before that term counts; then beta falls from 20 to 2.
        drop: share of the values that stay unrounded in training, of inputs and at every activation inside.
        steps, biases: whether the scales of activations, and a shift of every bias, are learned too.
        rounding: "soft" (sigmoids), "signs" (signed gradients) or "free" (any level, under scales that are
            learned too).
        rounds: parts of the steps, with "free" each with a rate that falls to 0. After a part without gain what it
            learned is taken back, and the next begins at a third of its rate.
    """

    iterations: int
    batch: int
    rate: float
    pressure: float
    warmup: float
    drop: float
    steps: bool
    biases: bool
    rounding: Rounding
    rounds: int = 1


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
        chunk: samples that are run at once where the error is measured.
    """

    unit: Unit
    module: nn.Module
    weights: list[tuple[Any, str, Tensor]]
    samples: Samples
    target: Tensor | list[Tensor]
    floats: Samples | None = None
    importance: Tensor | list[Tensor] | None = None
    ties: tuple[tuple[ActivationQuantizer, ...], ...] = ()
    chunk: int = 64

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
        size = 1 if self.samples.ragged else self.chunk
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
        before = best = block.measured()
        kept = _State.of(block)
        learner = _Learner(block, settings)
        values = learner.values()
        for _ in range(settings.rounds):
            learner.run(max(before, 1e-20), tick)
            learner.settle()
            after = block.measured()
            if after < best:
                best, kept, values = after, _State.of(block), learner.values()
            else:
                learner.back(values)
                learner.pace *= SLOWER
        kept.restore()
    return before, best


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


class _Learner:
    """What is learned of a block, and the steps."""

    def __init__(self, block: Block, settings: Settings) -> None:
        self.block, self.settings = block, settings
        self.pace = 1.0  # of all rates
        self.learned = [
            (t, n, _rounding(w, t.solved[n], settings))
            for t, n, w in block.weights
            if can_soften(t.solved[n])
        ]
        twins = {id(t): t for t, _, _ in self.learned}.values()
        shifts = [_Shift(t) for t in twins if _shiftable(t)] if settings.biases else []
        steps = [_Step(group) for group in block.ties] if settings.steps else []
        self.beside: list[_Shift | _Step] = [*shifts, *steps]
        self.roundings = [r for _, _, r in self.learned]
        self.free = [*(p for r in self.roundings for p in r.parameters()), *(s.free for s in self.beside)]
        groups: list[dict[str, Any]] = [
            {
                "params": [r.logits for r in self.roundings if isinstance(r, SoftRounding)],
                "lr": settings.rate,
            },
            {"params": [r.place for r in self.roundings if isinstance(r, FreeRounding)], "lr": settings.rate},
            {
                "params": [r.stretch for r in self.roundings if isinstance(r, FreeRounding)],
                "lr": 0.1 * settings.rate,
            },
            {"params": [s.free for s in shifts], "lr": settings.rate},
            {"params": [s.free for s in steps], "lr": 0.1 * settings.rate},
        ]
        groups = [g for g in groups if g["params"]]
        self.optimizer = torch.optim.Adam(groups) if groups else None
        self.rates = [g["lr"] for g in groups]

    def run(self, unit: float, tick: Callable[[], object]) -> None:
        """The steps of a round; `unit`: the error that counts as 1."""
        block, settings = self.block, self.settings
        size = 1 if block.samples.ragged else min(settings.batch, block.samples.count)
        quantizers = [m for m in block.module.modules() if isinstance(m, ActivationQuantizer)]
        count = max(settings.iterations // settings.rounds, 1)
        with _in_place(self.learned), _dropping(quantizers, settings.drop):
            for i in range(count):
                for s in self.beside:
                    s.apply()
                index = torch.randint(block.samples.count, (size,))
                loss = block.error(index, settings.drop) / unit
                power = _power(i / settings.iterations, settings.warmup)
                if power:
                    undecided = sum(r.undecided(power) for r in self.roundings) / len(self.roundings)
                    loss = loss + settings.pressure * undecided
                gradients = torch.autograd.grad(loss, self.free, allow_unused=True)
                for p, gradient in zip(self.free, gradients, strict=True):
                    p.grad = gradient
                if settings.rounding == "signs":
                    self._signed_step(settings.rate * (1 - i / settings.iterations))
                if self.optimizer is not None:
                    if settings.rounding == "free":
                        # levels that still flip at the end would not be those the scales were learned for
                        self._rate(self.pace * (1 - i / count))
                    self.optimizer.step()
                tick()

    def _rate(self, factor: float) -> None:
        assert self.optimizer is not None
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor

    def values(self) -> list[Tensor]:
        """A copy of what is learned so far."""
        return [p.detach().clone() for p in self.free]

    def back(self, values: list[Tensor]) -> None:
        """To such a copy."""
        for p, value in zip(self.free, values, strict=True):
            p.data.copy_(value)

    def settle(self) -> None:
        """Let the block compute with codes of what is learned."""
        for twin, name, rounding in self.learned:
            twin.solved = {**twin.solved, name: rounding.codes()}
        for s in self.beside:
            s.apply()
            s.settle()

    def _signed_step(self, rate: float) -> None:
        with torch.no_grad():
            for r in self.roundings:
                assert isinstance(r, SignRounding)
                if r.logits.grad is not None:
                    r.logits.sub_(r.logits.grad.sign(), alpha=rate).clamp_(-0.5, 0.5)


def _rounding(matrix: Tensor, q: QTensor, settings: Settings) -> SoftRounding | SignRounding | FreeRounding:
    if settings.rounding == "signs":
        return SignRounding(matrix, q)
    return FreeRounding(matrix, q) if settings.rounding == "free" else SoftRounding(matrix, q)


def _power(progress: float, warmup: float) -> float:
    """beta: 0 at first, then from 20 down to 2."""
    if progress < warmup:
        return 0.0
    return 2 + 18 * (1 - (progress - warmup) / max(1 - warmup, 1e-9))


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

"""LAPQ: the scales of all layers are chosen together, by what the network's result loses."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from pennyweight.errors import EmptyCalibration
from pennyweight.graph.record import call
from pennyweight.nn.fake import ActivationQuantizer
from pennyweight.passes import Context, Stage, passes
from pennyweight.passes.calibrate import quantizers
from pennyweight.passes.solve import solve_one, weights
from pennyweight.progress import track
from pennyweight.qtensor import QParams, quantize
from pennyweight.ranges.mse import MSE
from pennyweight.reconstruction.capture import floating
from pennyweight.reconstruction.results import divergence, first_batches
from pennyweight.reconstruction.samples import first_tensor
from pennyweight.solvers.rtn import rtn


@passes.register("lapq")
@dataclass(frozen=True)
class Lapq:
    """Choose the scale of every weight and activation so that the network's result stays, all of them together.

    1. For each p the scales that make `sum |x - Q(x)|^p` least, tensor by tensor, and the loss L(p) of the network;
       then p* at the vertex of the parabola through L, if that is better still.
    2. Powell's method from there, over the logarithms of all scales: line searches along a set of directions, the most
       fruitful of which gives way to the sum of a round's moves.

    The loss is the divergence of the softmax from the float network's where the result has two axes, and the mean
    squared error otherwise; labels are not needed. Weights are rounded to nearest. For small networks: every step runs
    the samples once. The result is never worse than the best of the first stage on these samples.

    Args:
        powers: p of the first stage.
        evaluations: how often the loss may be computed in the second.
        samples: batches of the calibration data to compute it on, until there are so many samples.
        step: first step of a line search, in log2 of a scale.

    Source: Nahshan et al. 2019, "Loss Aware Post-training Quantization" (arXiv:1911.07190), algorithm 1.
    """

    powers: tuple[float, ...] = (2.0, 2.5, 3.0, 3.5, 4.0)
    evaluations: int = 300
    samples: int = 256
    step: float = 0.1
    stage: ClassVar[Stage] = "solve"
    preserves_output: ClassVar[bool] = False
    replays: ClassVar[bool] = True

    def needs(self) -> set[str]:
        """Histograms of the activations."""
        return {"histogram"}

    def run(self, context: Context) -> None:
        """Set all scales and codes; one `lapq` event with p*, and the loss after each stage.

        Raises:
            EmptyCalibration: if there is no batch.
        """
        problem = _Problem.of(context, self.samples)
        starts = []
        for p in self.powers:
            problem.start(p)
            starts.append((problem.loss(problem.zeros()), p))
        best = min(starts)
        vertex = _vertex([s[1] for s in starts], [s[0] for s in starts])
        if vertex is not None and min(self.powers) < vertex < max(self.powers):
            problem.start(vertex)
            best = min(best, (problem.loss(problem.zeros()), vertex))
        problem.start(best[1])
        bar = iter(track(range(self.evaluations), "lapq", show=context.progress))
        found, loss = powell(
            problem.loss, problem.zeros(), best[0], self.step, self.evaluations, lambda: next(bar, 0)
        )
        problem.settle(found)
        context.journal.add("lapq", "", power=best[1], layerwise=best[0], joint=loss, scales=len(found))


class _Problem:
    """Scales as a vector: one number for each group of activations that share one, and one for each weight."""

    def __init__(self, context: Context, batches: list[Any], wanted: list[Tensor]) -> None:
        self.context, self.batches, self.wanted = context, batches, wanted
        self.weights = weights(context.model, dict(context.model.named_parameters()))
        every = quantizers(context.model)
        tied = [[every[str(s)] for s in group if str(s) in every] for group in context.plan.ties]
        alone = [[q] for s, q in every.items() if not any(q in group for group in tied)]
        self.groups = [group for group in [*tied, *alone] if group]
        self.seen = [_merged(group) for group in self.groups]
        self.params: list[QParams] = []
        self.rows: list[QParams] = []

    @classmethod
    def of(cls, context: Context, samples: int) -> _Problem:
        batches = first_batches(context.batches, "lapq", samples)
        with floating(context.model), torch.no_grad():
            wanted = [first_tensor(call(context.model, b)) for b in batches]
        for quantizer in quantizers(context.model).values():
            quantizer.active = True
        return cls(context, batches, wanted)

    def zeros(self) -> Tensor:
        return torch.zeros(len(self.groups) + len(self.weights), dtype=torch.float64)

    def start(self, power: float) -> None:
        """The scales of one p-norm."""
        rule = MSE(steps=40, power=power)
        self.params = [rule(seen, g[0].spec) for seen, g in zip(self.seen, self.groups, strict=True)]
        self.rows = []
        for twin, name, matrix in self.weights:
            q = rtn(matrix.float(), twin.layer.weight, rule)
            self.rows.append(QParams(q.scales(), q.zero))
            twin.solved[name] = q

    def apply(self, x: Tensor) -> None:
        factors = (2.0**x).float()
        for group, params, f in zip(self.groups, self.params, factors[: len(self.groups)], strict=True):
            for quantizer in group:
                quantizer.set(QParams(params.scale * f, params.zero))
        for (twin, name, matrix), params, f in zip(
            self.weights, self.rows, factors[len(self.groups) :], strict=True
        ):
            scaled = QParams(params.scale * f, params.zero)
            twin.solved[name] = quantize(matrix.float(), twin.layer.weight, scaled)

    def loss(self, x: Tensor) -> float:
        self.apply(x)
        total = 0.0
        with torch.no_grad():
            for batch, wanted in zip(self.batches, self.wanted, strict=True):
                total += float(divergence(wanted, first_tensor(call(self.context.model, batch))))
        return total / len(self.batches)

    def settle(self, x: Tensor) -> None:
        """Codes and scales as found, with their events."""
        self.apply(x)
        for twin, name, matrix in self.weights:
            q = twin.solved[name]
            solve_one(self.context, twin, name, matrix, lambda w, spec, rule, q=q: q, MSE())
        for group in self.groups:
            for quantizer in group:
                self.context.journal.add(
                    "range",
                    quantizer.site,
                    scale=float(quantizer.scale),
                    zero=float(quantizer.zero),
                    rule="lapq",
                )


def _merged(group: list[ActivationQuantizer]) -> Any:
    """The histogram of all that a group has seen; the quantizers keep their own."""
    if any("histogram" not in q.statistics or not q.statistics["histogram"].count for q in group[:1]):
        raise EmptyCalibration("no calibration value reached this site", site=group[0].site)
    first: Any = copy.deepcopy(group[0].statistics["histogram"])
    for other in group[1:]:
        if other.statistics["histogram"].count:
            first.merge(other.statistics["histogram"])
    return first


def _vertex(x: list[float], y: list[float]) -> float | None:
    """Where the parabola through the points (least squares) is least, or None if it opens downwards."""
    if len(x) < 3:
        return None
    a = torch.tensor(x, dtype=torch.float64)
    design = torch.stack([a**2, a, torch.ones_like(a)], 1)
    c = torch.linalg.lstsq(design, torch.tensor(y, dtype=torch.float64).unsqueeze(1)).solution.flatten()
    return None if float(c[0]) <= 0 else float(-c[1] / (2 * c[0]))


def powell(
    f: Callable[[Tensor], float],
    x: Tensor,
    value: float,
    step: float,
    evaluations: int,
    tick: Callable[[], object],
) -> tuple[Tensor, float]:
    """Minimise without gradients; returns the best point and its value, never worse than the first.

    A line search tries a step to both sides, then the vertex of the parabola through the three points.

    Args:
        f: of a vector.
        x: where to start.
        value: f(x).
        step: of the first round; halved after a round that found nothing.
        evaluations: of f, at most.
        tick: called after each.
    """
    directions = list(torch.eye(len(x), dtype=x.dtype))
    left = evaluations

    def at(point: Tensor) -> float:
        nonlocal left
        left -= 1
        tick()
        return f(point)

    while left > 0 and step > 1e-3:
        begin, gains = x.clone(), []
        for d in directions:
            if left < 3:
                left = 0
                break
            before, sides = value, (at(x + step * d), at(x - step * d))
            trials = [(sides[0], step), (sides[1], -step)]
            curve = sides[0] + sides[1] - 2 * value
            if curve > 0:
                t = max(-3.0, min(3.0, 0.5 * (sides[1] - sides[0]) / curve)) * step
                if abs(t) > 1e-3 * step:
                    trials.append((at(x + t * d), t))
            low, t = min(trials)
            if low < value:
                x, value = x + t * d, low
            gains.append(before - value)
        moved = x - begin
        if not bool(moved.any()):
            step /= 2
        elif len(gains) == len(directions):
            best = max(range(len(gains)), key=gains.__getitem__)
            directions[best] = moved / moved.norm()
    return x, value

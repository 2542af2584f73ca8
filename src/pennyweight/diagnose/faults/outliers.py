"""Channels far greater than the others, where one scale serves all."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pennyweight.diagnose.finding import Case, Finding, causes, in_float
from pennyweight.diagnose.simulate import Matrix, Simulation
from pennyweight.ranges.mse import MSE
from pennyweight.solvers.rtn import rtn
from pennyweight.spec import QuantSpec

RATIO = 8.0  # greatest channel to the median one
FEW = 32.0  # codes of each sign that are left to the median channel


@causes.register("outlier channel")
def in_weights(case: Case) -> list[Finding]:
    """One scale for a weight whose rows differ."""
    simulation, found = case.simulation, []
    for name, weight in simulation.weights.items():
        if not isinstance(weight, Matrix) or weight.scale.numel() != 1 or len(weight.values) < 2:
            continue
        rows = simulation.matrices[name].abs().amax(1)
        median = float(rows.median())
        if float(rows.max()) < RATIO * median or median / float(weight.scale) > FEW:
            continue
        worst = int(rows.argmax())
        found.append(
            Finding(
                "outlier channel", f"{name}:weight",
                f"output channel {worst} reaches {float(rows[worst]):.3g}, the median channel {median:.3g}: "
                f"{median / float(weight.scale):.1f} codes a sign are left for it",
                "One scale per channel (int8n[1,*]); or equalize the channels (int8-data-free).",
                _per_channel(name), severity=float(rows.max()) / max(median, 1e-12),
            )
        )  # fmt: skip
    return found


def _per_channel(name: str) -> Callable[[Simulation], float]:
    def trial(simulation: Simulation) -> float:
        """The output with one scale for each row."""
        spec = QuantSpec.parse("int8n[1,*]")
        q = rtn(simulation.matrices[name], spec, MSE(steps=16, shrink=0.85))
        weight = Matrix(q.dequantize(), q.codes, q.scales().reshape(-1))
        with simulation.changed(weights={name: weight}, shifts={name: _corrected(simulation, name, weight)}):
            return simulation.damage().sqnr_db

    return trial


def _corrected(simulation: Simulation, name: str, weight: Matrix) -> Tensor | None:
    """A shift that belonged to other codes would do harm: none."""
    shift = simulation.shifts.get(name)
    return None if shift is None or bool((weight.values == 0).all()) else torch.zeros_like(shift)


@causes.register("outlier channel in activations")
def in_activations(case: Case) -> list[Finding]:
    """One scale for activations whose channels differ."""
    simulation, found = case.simulation, []
    for site, seen in simulation.seen.items():
        now = simulation.ranges.get(site)
        if now is None or seen.channels is None or len(seen.channels) < 4:
            continue
        alive = seen.channels[seen.channels > 0]
        if len(alive) < 4:
            continue
        median, most = float(alive.median()), float(alive.max())
        left = median / now.scale
        if most < RATIO * median or left > FEW or most > 2 * max(now.hi, -now.lo):
            continue
        worst = int(seen.channels.argmax())
        layer = simulation.layer_of(site)
        found.append(
            Finding(
                "outlier channel in activations", site,
                f"channel {worst} reaches {most:.3g}, the median channel {median:.3g}: {left:.1f} codes are left for "
                "it",
                "Shift the scale into the weights (equalize, smooth), range it at run time, or keep the layer in bf16.",
                in_float(layer), severity=most / max(median, 1e-12),
            )
        )  # fmt: skip
    return found

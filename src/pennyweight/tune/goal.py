"""What is wanted, what was tried, and what came out."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from pennyweight.errors import InputError, nearest
from pennyweight.journal import Journal
from pennyweight.recipe import Recipe
from pennyweight.tune.costs import Costs
from pennyweight.tune.sensitivities import Sensitivity

Objective = Literal["latency", "size", "bops"]
OBJECTIVES = {"latency": "ns", "size": "bytes", "bops": "bops"}
_UNITS = {"s": 1.0, "sec": 1.0, "second": 1.0, "seconds": 1.0, "min": 60.0, "minute": 60.0, "minutes": 60.0,
          "m": 60.0, "h": 3600.0, "hour": 3600.0, "hours": 3600.0}  # fmt: skip


@dataclass(frozen=True)
class Goal:
    """What a search is to reach.

    Args:
        max_drop: greatest accepted loss against float, in the units of `evaluate` (points, if that gives percent).
        minimize: "latency", "size" or "bops" (multiply-adds times bits of both operands), among models that lose less.
        limit_size: greatest accepted bytes of parameters.
        limit_latency: greatest accepted milliseconds of a run.
        batch: samples of the runs that are timed; 0 for the example as it is.
        higher_is_better: whether `evaluate` grows with quality; False for losses and perplexities.

    Raises:
        InputError: on values that mean nothing.
    """

    max_drop: float = 0.5
    minimize: Objective = "latency"
    limit_size: float | None = None
    limit_latency: float | None = None
    batch: int = 1
    higher_is_better: bool = True

    def __post_init__(self) -> None:
        if self.minimize not in OBJECTIVES:
            hint = nearest(str(self.minimize), OBJECTIVES, "objectives")
            raise InputError(f"a goal cannot minimize {self.minimize!r}", hint=hint)
        if not self.max_drop >= 0:
            raise InputError(f"max_drop = {self.max_drop} is no loss", hint="0, or a positive number.")
        for name in ("limit_size", "limit_latency"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InputError(f"{name} = {value} can never be met", hint="A positive number, or None.")

    def drop(self, before: float, after: float) -> float:
        """How much worse `after` is."""
        return before - after if self.higher_is_better else after - before

    def met(self, trial: Trial) -> bool:
        """Whether a trial keeps every promise. A millionth of the score is forgiven: sums of floats are not exact."""
        slack = 1e-6 * max(1.0, abs(trial.score))
        return (
            trial.drop <= self.max_drop + slack
            and (self.limit_size is None or trial.bytes <= self.limit_size)
            and (self.limit_latency is None or trial.latency_ms <= self.limit_latency)
        )

    def value(self, trial: Trial) -> float:
        """What is to be small."""
        return {"latency": trial.latency_ms, "size": trial.bytes, "bops": trial.bops}[self.minimize]


def seconds_of_budget(budget: str | float | None) -> float:
    """Seconds of "10 min", "90 s", "1 h" or a number; None is without end.

    Raises:
        InputError: on other texts.

    >>> seconds_of_budget("10 min")
    600.0
    """
    if budget is None:
        return float("inf")
    if isinstance(budget, int | float):
        found = float(budget)
    else:
        match = re.fullmatch(r"\s*([0-9.]+)\s*([a-z]*)\s*", budget.lower())
        if match is None or match[2] not in {"", *_UNITS}:
            raise InputError(
                f"{budget!r} is no span of time", hint='"10 min", "90 s", or a number of seconds.'
            )
        found = float(match[1]) * _UNITS.get(match[2], 1.0)
    if not found > 0:
        raise InputError(f"a budget of {budget!r} leaves no time", hint='For example "10 min".')
    return found


class Clock:
    """A budget that runs down."""

    def __init__(self, budget: str | float | None) -> None:
        self.start, self.budget = time.perf_counter(), seconds_of_budget(budget)

    @property
    def spent(self) -> float:
        """Seconds since it was started."""
        return time.perf_counter() - self.start

    @property
    def left(self) -> float:
        """Seconds that remain; below 0 afterwards."""
        return self.budget - self.spent

    def allows(self, seconds: float) -> bool:
        """Whether something that takes so long would end in time."""
        return self.left >= seconds


@dataclass
class Trial:
    """One model that was made and evaluated.

    Attributes:
        rung: of the ladder: "float", "data-free", "calibrated", "bias-corrected", "retargeted", "reconstructed",
            "run-time ranges", "mixed", "mixed, retargeted", "mixed, reconstructed" or "trained".
        name: of its recipe.
        score: what `evaluate` gave; drop: against float.
        latency_ms: of a run of the goal's batch, measured in turns with float; speedup: over float on the same engine.
        bytes: of its parameters and buffers; bops: of a sample.
        seconds: what it took to make and to evaluate it.
        met: whether it reaches the goal.
        assignment: format of each layer, of mixed models.
        recipe: to make it again.
    """

    rung: str
    name: str
    score: float
    drop: float
    latency_ms: float
    speedup: float
    bytes: int
    bops: float
    seconds: float
    met: bool = False
    assignment: dict[str, str] = field(default_factory=dict)
    recipe: Recipe | None = None

    def facts(self) -> dict[str, Any]:
        """Plain JSON values."""
        found: dict[str, Any] = {
            "name": self.name, "score": self.score, "drop": self.drop, "latency_ms": self.latency_ms,
            "speedup": self.speedup, "bytes": self.bytes, "bops": self.bops, "seconds": self.seconds, "met": self.met,
        }  # fmt: skip
        if self.assignment:
            found["formats"] = dict(self.assignment)
        return found


def pareto(trials: Sequence[Trial], goal: Goal) -> list[Trial]:
    """Trials that no other beats in both the loss and what is to be small, cheapest first."""
    order = sorted(trials, key=lambda t: (goal.value(t), t.drop))
    front: list[Trial] = []
    for trial in order:
        if not front or trial.drop < front[-1].drop:
            front.append(trial)
    return front


@dataclass
class Tuning:
    """What a search for a goal found.

    Attributes:
        model: converted; runs, saves and lowers as any other. The best found, whether or not the goal is met.
        chosen: its trial; recipe: what made it.
        met: whether the goal is met.
        trials: all, in order, float first.
        front: those that no other beats.
        sensitivity, costs: the evidence that mixed models were chosen on, where it was needed.
        stopped: why the search ended: "goal", "budget" or "ladder".
        seconds: what it took.
        journal: `trial`, `sensitivity`, `cost`, `front` and `chosen` events; the model's own has them too.
    """

    model: nn.Module
    chosen: Trial
    recipe: Recipe | None
    met: bool
    goal: Goal
    trials: list[Trial]
    front: list[Trial]
    sensitivity: Sensitivity | None
    costs: Costs | None
    stopped: str
    seconds: float
    journal: Journal

    def rows(self) -> list[dict[str, Any]]:
        """The trials as table rows."""
        front = {id(t) for t in self.front}
        return [
            {
                "rung": t.rung, "recipe": t.name, "score": t.score, "drop": t.drop, "ms": t.latency_ms,
                "x": t.speedup, "bytes": t.bytes, "Gbops": t.bops / 1e9, "s": t.seconds, "goal": t.met,
                "front": id(t) in front, "chosen": t is self.chosen,
            }
            for t in self.trials
        ]  # fmt: skip

    def table(self) -> Any:
        """The trials as a `rich.table.Table`."""
        from rich.table import Table

        table = Table(
            title=f"goal {'met' if self.met else 'not met'}, {self.seconds:.0f} s, ended by {self.stopped}"
        )
        rows = self.rows()
        for column in rows[0]:
            table.add_column(column, justify="left" if column in ("rung", "recipe") else "right")
        for row in rows:
            table.add_row(*(_cell(v) for v in row.values()))
        return table

    def evidence(self) -> dict[str, Any]:
        """Everything the choice rests on, as plain JSON values."""
        return {
            "goal": {k: getattr(self.goal, k) for k in self.goal.__dataclass_fields__},
            "met": self.met, "stopped": self.stopped, "seconds": self.seconds,
            "trials": [{"rung": t.rung, **t.facts()} for t in self.trials],
            "front": [t.name for t in self.front], "chosen": self.chosen.name,
            "costs": None if self.costs is None else self.costs.to_dict(),
            "sensitivity": None if self.sensitivity is None else self.sensitivity.table(),
        }  # fmt: skip


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def summary_of(assignment: Mapping[str, str]) -> str:
    """`12 int8, 3 bf16`."""
    counts: dict[str, int] = {}
    for form in assignment.values():
        counts[form] = counts.get(form, 0) + 1
    return ", ".join(f"{n} {form}" for form, n in sorted(counts.items(), key=lambda c: -c[1]))

"""Mixed precision: which assignments of formats to layers are worth trying."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pennyweight.errors import PennyweightError
from pennyweight.journal import Journal
from pennyweight.recipe import Recipe
from pennyweight.tune.allocate import Choice, Edge, conversions, solve, tied_groups
from pennyweight.tune.costs import Costs, measured_costs
from pennyweight.tune.formats import layer_formats
from pennyweight.tune.goal import OBJECTIVES, Clock, Goal, summary_of
from pennyweight.tune.probe import Probe
from pennyweight.tune.sensitivities import Sensitivity, fingerprint, fit_of, measure_on

CHEAPER = 0.95  # of the cost of safer formats: from here on a format is worth its damage
WORTH = 0.95  # of the cost of int8 throughout: what mixes must promise once the goal is reached
STEPS = 24  # bounds of damage between the safest and the cheapest assignment
SHARE = 0.4  # of the time left, that probing sensitivities may take
PROBING_BATCHES = 2  # that uniform models are calibrated on: only their speed counts


class Mixer:
    """Costs and damages of every layer in every format, and the assignments along their front.

    Args:
        model, batches: as for `tune`.
        base: recipe that says what "int8" means.
        formats: names.
        goal, clock: what to reach, and until when.
        samples: to measure damages on.
        threads: of the engine.
        cache: file of sensitivities, or None.
        seed: of everything random.
        journal: `cost`, `promise`, `sensitivity` and `note` events go there.
    """

    def __init__(
        self, model: nn.Module, batches: Sequence[Any], base: Recipe, formats: Sequence[str], goal: Goal, clock: Clock,
        *, samples: int, threads: int, cache: str | Path | None, seed: int, journal: Journal,
    ) -> None:  # fmt: skip
        self.model, self.batches, self.base = model, batches, base
        self.formats, self.goal, self.clock = tuple(formats), goal, clock
        self.samples, self.threads, self.cache, self.seed = samples, threads, cache, seed
        self.journal = journal
        self.probe = Probe(model, batches, formats, base, samples=samples, seed=seed)
        self.costs: Costs = measured_costs(
            model, self.probe, batches, base, batch=goal.batch, threads=threads
        )
        self.costs.write(journal, self.probe.layers, self.formats)
        self.known = Sensitivity()
        self.groups = tied_groups(self.probe.plan, self.probe.layers)

    @cached_property
    def edges(self) -> list[Edge]:
        """Where values are converted if formats differ, with the times."""
        samples = max(rows_of(self.batches[0]), 1)
        return conversions(self.probe.graph, self.groups, self.costs.ns_per_value / samples)

    @property
    def objective(self) -> str:
        """Name of the cost to minimise; bit operations stand in for times that could not be measured."""
        name = OBJECTIVES[self.goal.minimize]
        return "bops" if name == "ns" and not self.costs.ns else name

    def total(self, assignment: dict[str, str]) -> dict[str, float]:
        """Sums over layers, by the name of the cost; layers that are not named are int8."""
        found: dict[str, float] = {}
        for layer in self.probe.layers:
            for name, value in self.costs.of(layer, assignment.get(layer, "int8")).items():
                found[name] = found.get(name, 0.0) + value
        return found

    def choices(self, group: Sequence[str], *, reached: bool) -> list[str]:
        """Formats that all layers of a group can have and that are worth their damage: cheaper than any safer one.

        reached: whether int8 throughout already reaches the goal; then nothing safer is needed for its own sake.
        """
        able = [f for f in self.formats if all(f in self.probe.choices(layer) for layer in group)]
        able.sort(key=lambda f: (-layer_formats[f].weight, -layer_formats[f].input))
        names = {self.objective}
        names |= {"bytes"} if self.goal.limit_size is not None else set()
        names |= {"ns"} if self.goal.limit_latency is not None and self.costs.ns else set()
        kept: list[str] = ["int8"] if reached else []
        for form in able:
            cheaper = not kept or any(
                self._cost(group, form)[n] < CHEAPER * min(self._cost(group, k)[n] for k in kept)
                for n in names
            )
            if form not in kept and cheaper:
                kept.append(form)
        return kept

    def _cost(self, group: Sequence[str], form: str) -> dict[str, float]:
        found: dict[str, float] = {}
        for layer in group:
            for name, value in self.costs.of(layer, form).items():
                found[name] = found.get(name, 0.0) + value
        return found

    def _options(self, *, reached: bool, damages: bool) -> list[list[Choice]]:
        return [
            [
                Choice(
                    form,
                    sum(self._damage(layer, form) for layer in group) if damages else 0.0,
                    self._cost(group, form),
                    layer_formats[form].integer,
                )
                for form in self.choices(group, reached=reached)
            ]
            for group in self.groups
        ]

    def promises(self) -> bool:
        """Whether some mix, whatever it loses, is predicted to be cheaper than int8 throughout."""
        options = self._options(reached=True, damages=False)
        name = self.objective
        picked = solve(options, minimize=name, edges=self.edges)
        assert picked is not None  # there is no limit
        assignment = self._assignment(options, picked)
        now, then = self.total({}).get(name, 0.0), self.total(assignment).get(name, 0.0)
        if name == "ns":
            then += sum(
                e.ns for e in self.edges
                if options[e.source][picked[e.source]].integer != options[e.target][picked[e.target]].integer
            )  # fmt: skip
        self.journal.add("promise", objective=name, int8=now, mixed=then, formats=summary_of(assignment))
        return then < WORTH * now

    def measure(self, *, reached: bool, reserve: float) -> bool:
        """Damages of every format that is worth it; by derivatives where probing would take too long.

        reserve: seconds that must be left afterwards. Returns whether they are.
        """
        mark = fingerprint(self.model, self.batches, self.base, self.samples, self.seed)
        if self.cache is not None and Path(self.cache).exists():
            stored = Sensitivity.load(self.cache)
            self.known = stored if stored.fingerprint == mark else self.known
        self.known.fingerprint = mark
        wanted = {(n, f) for g in self.groups for f in self.choices(g, reached=reached) for n in g}
        have = {(r.layer, r.form) for r in self.known.rows if r.part == "both"}
        jobs = sum(f != "float32" for n, f in wanted - have)
        start = time.perf_counter()
        self.probe.outputs()
        expected = jobs * (time.perf_counter() - start)
        if expected > SHARE * max(self.clock.left - reserve, 0.0):
            note = (
                f"{jobs} probes would take {expected:.0f} s; FIT scores of one backward pass are used instead"
            )
            self.journal.add("note", text=note)
            try:
                measure_on(self.probe, self.known, ("fisher",), seed=self.seed)
            except (PennyweightError, RuntimeError) as error:
                self.journal.add("note", text=f"there are no derivatives: {error}")
                return False
            return self.clock.allows(reserve)
        measure_on(
            self.probe, self.known, ("both",), seed=self.seed, wanted=wanted,
            deadline=lambda: not self.clock.allows(reserve),
        )  # fmt: skip
        if self.cache is not None:
            self.known.save(self.cache)
        self.known.write(self.journal)
        return self.clock.allows(reserve)

    def _damage(self, layer: str, form: str) -> float:
        if form == "float32":
            return 0.0
        if any((r.layer, r.form, r.part) == (layer, form, "both") for r in self.known.rows):
            return self.known.damage(layer, form)
        return fit_of(self.probe, self.known, layer, form) or 0.0

    def _assignment(self, options: Sequence[Sequence[Choice]], picked: Sequence[int]) -> dict[str, str]:
        return {n: options[g][c].form for g, c in enumerate(picked) for n in self.groups[g]}

    def candidates(self, *, reached: bool, fixed_bytes: float) -> list[dict[str, str]]:
        """Assignments along the predicted front, the cheapest and most damaging first; uniform ones left out.

        fixed_bytes: of the model, beside the weights whose formats are chosen.
        """
        goal, limits = self.goal, dict[str, float]()
        if goal.limit_size is not None:
            limits["bytes"] = goal.limit_size - fixed_bytes
        if goal.limit_latency is not None and self.costs.ns:
            limits["ns"] = goal.limit_latency * 1e6
        options = self._options(reached=reached, damages=True)
        least = solve(options, minimize="damage", limits=limits, edges=self.edges)
        cheapest = solve(options, minimize=self.objective, limits=limits, edges=self.edges)
        if least is None or cheapest is None:
            self.journal.add("note", text="no mix of formats keeps the limits of size and latency")
            return []
        low, high = (sum(options[g][c].damage for g, c in enumerate(p)) for p in (least, cheapest))
        low = max(low, high * 1e-4, 1e-12)
        found: list[dict[str, str]] = []
        for k in range(STEPS + 1):
            bound = high * (low / high) ** (k / STEPS) if high > low else low
            picked = solve(
                options, minimize=self.objective, limits={**limits, "damage": bound}, edges=self.edges
            )
            if picked is not None:
                found.append(self._assignment(options, picked))
        if not reached:
            found.append(self._assignment(options, least))
        everywhere = dict.fromkeys(self.probe.layers, "int8")
        return [
            a for i, a in enumerate(found)
            if a != everywhere and set(a.values()) != {"float32"} and a not in found[:i]
        ]  # fmt: skip


def rows_of(batch: Any) -> int:
    """Samples of a batch; 1 where its tensors have no common first axis."""
    rows = {len(t) for t in torch.utils._pytree.tree_leaves(batch) if isinstance(t, torch.Tensor) and t.ndim}
    return rows.pop() if len(rows) == 1 else 1

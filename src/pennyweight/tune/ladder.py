"""Climb from the cheapest method to the dearest, only as far as the goal needs."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pennyweight.compiled import compile as compile_model
from pennyweight.errors import (
    EmptyCalibration,
    InputError,
    LowerError,
    NothingQuantized,
    RecipeError,
    nearest,
)
from pennyweight.graph.record import call
from pennyweight.journal import Journal
from pennyweight.passes.adaround import AdaRound
from pennyweight.passes.correct_bias import CorrectBias
from pennyweight.passes.solve import Solve
from pennyweight.pipeline import calibrate, convert, model_bytes, quantize, state
from pennyweight.recipe import Recipe, presets
from pennyweight.tune.costs import mixed, run_ns, single
from pennyweight.tune.fine_tune import Loader, limited
from pennyweight.tune.formats import layer_formats
from pennyweight.tune.goal import Clock, Goal, Trial, Tuning, pareto, summary_of
from pennyweight.tune.mixing import Mixer, rows_of

TARGETS = ("native",)
FORMATS = ("float32", "bf16", "int8", "int4")
DATA_FREE = ("int8-data-free",)
SURVEY = 5  # times a trial that measuring every layer in each format takes, with two trials after it
MOST_STEPS, FEWEST_STEPS = 1000, 200  # of learning the rounding of a layer
LEARNING = 0.5  # of the time left, that it may take

Evaluate = Callable[[nn.Module], float]


@dataclass
class _Rung:
    name: str
    recipe: Recipe


def rungs(base: Recipe) -> list[_Rung]:
    """The rungs of one format for all layers, cheapest first; those whose recipe does not exist are left out."""
    known = set(presets())
    found = [_Rung("data-free", Recipe.preset(n)) for n in DATA_FREE if n in known]
    plain = tuple(p for p in base.passes if not isinstance(p, CorrectBias))
    if len(plain) < len(base.passes):
        found.append(
            _Rung("calibrated", replace(base, name=f"{base.name}, biases as they were", passes=plain))
        )
        found.append(_Rung("bias-corrected", base))
    else:
        found.append(_Rung("calibrated", base))
    found.append(_Rung("retargeted", retargeted(base)))
    found.append(_Rung("reconstructed", base))
    found.append(_Rung("run-time ranges", Recipe.preset("int8-dynamic")))
    return found


def retargeted(recipe: Recipe) -> Recipe:
    """The recipe with every layer, and its bias, aimed at its results in the float network; or its bias alone."""
    found = _solved_by(recipe, "retargeted", lambda s: Solve("gptq", s.range, dict(s.options), retarget=True))
    return replace(found, passes=(*found.passes, CorrectBias("outputs", keep=True)))


def with_learned_rounding(recipe: Recipe, steps: int) -> Recipe:
    """The recipe with AdaRound in the place of its solver and of corrected biases, which it learns as well."""
    return _solved_by(
        recipe, f"rounding learned in {steps} steps",
        lambda s: AdaRound(s.range, dict(s.options), iterations=steps),
    )  # fmt: skip


def _solved_by(recipe: Recipe, how: str, other: Callable[[Solve], Any]) -> Recipe:
    """The recipe with another pass for its solver, one that finds biases too: none is corrected after."""
    kept = (p for p in recipe.passes if not isinstance(p, CorrectBias))
    passes = tuple(other(p) if isinstance(p, Solve) else p for p in kept)
    return replace(recipe, name=f"{recipe.name}, {how}", passes=passes)


class Climb:
    """One search. See `tune.tune` for the arguments."""

    def __init__(
        self, model: nn.Module, batches: Sequence[Any], evaluate: Evaluate, goal: Goal, *, base: Recipe,
        formats: Sequence[str], budget: str | float | None, train: Loader | None, loss: Any, train_steps: int,
        cache: str | Path | None,
        samples: int, threads: int, seed: int, progress: bool, journal: Journal,
    ) -> None:  # fmt: skip
        if not batches:
            raise EmptyCalibration("there is no batch to calibrate with", hint="Pass some hundred inputs.")
        for name in formats:
            if name not in layer_formats:
                raise InputError(f"there is no format {name!r}", hint=nearest(name, layer_formats, "formats"))
        self.model, self.batches, self.evaluate, self.goal = model, batches, evaluate, goal
        self.base, self.formats = base, tuple(dict.fromkeys([*formats, "int8"]))
        self.train, self.loss, self.train_steps = train, loss, train_steps
        self.cache, self.samples = cache, samples
        self.threads = threads or torch.get_num_threads()
        self.seed, self.progress, self.journal = seed, progress, journal
        self.clock = Clock(budget)
        self.example = single(batches[0], goal.batch)
        self.trials: list[Trial] = []
        self.models: dict[int, nn.Module] = {}
        self.best: Trial | None = None
        self.mixer: Mixer | None = None
        self.float_score = 0.0
        self.float_run: nn.Module = model
        self.float_ns = 0.0

    # -- the climb ------------------------------------------------------------------------------------------------

    def run(self) -> Tuning:
        """Climb."""
        self._float()
        stopped = self._uniform()
        if stopped != "budget":
            stopped = self._mixed(stopped)
        if stopped != "budget" and not self._reached():
            self._learned_mix()
        if self.train is not None and not self._reached() and stopped != "budget":
            stopped = self._trained()
        return self._done("goal" if self._reached() and stopped != "budget" else stopped)

    def _reached(self) -> bool:
        return self.best is not None and self.best.met

    def _float(self) -> None:
        start = time.perf_counter()
        with torch.no_grad():
            self.float_score = float(self.evaluate(self.model))
        seconds = time.perf_counter() - start
        try:
            self.float_run = compile_model(copy.deepcopy(self.model), self.batches[0], threads=self.threads)
        except (LowerError, InputError) as error:
            self.journal.add("note", text=f"no whole-graph form: {error.what}; models run layer by layer")
        times = run_ns({"float": self.float_run}, self.example, threads=self.threads, seconds=0.3)
        self.float_ns = times["float"]
        trial = Trial("float", "float32", self.float_score, 0.0, self.float_ns / 1e6, 1.0, model_bytes(self.model),
                      0.0, seconds)  # fmt: skip
        self._note(trial)

    def _uniform(self) -> str:
        for rung in rungs(self.base):
            if self.best is not None and not self.clock.allows(self._expected()):
                return "budget"
            try:
                recipe = self._learning(rung.recipe) if rung.name == "reconstructed" else rung.recipe
                if recipe is not None:
                    self._try(rung.name, recipe, partial(self._quantized, recipe))
            except (NothingQuantized, RecipeError) as error:
                self.journal.add("note", text=f"{rung.name} was left out: {error.what}")
            if self._reached():
                return "goal"
            if any(t.drop <= self.goal.max_drop for t in self.trials[1:]):
                break  # accurate enough: what is not kept is a limit, which no other rung of 8 bits would keep
        return "ladder"

    def _learning(self, recipe: Recipe) -> Recipe | None:
        """The recipe with learned rounding, in as many steps as there is time for; None where there is too little."""
        rows = rows_of(self.batches[0])
        start = time.perf_counter()
        with torch.no_grad():
            call(self.model, self.batches[0])
        a_sample = (time.perf_counter() - start) / rows
        layers = sum(getattr(m, "weight", None) is not None for m in self.model.modules())
        samples = sum(rows_of(b) for b in self.batches)
        looking = 2 * layers * samples * a_sample  # inputs and results of every layer
        left = LEARNING * (self.clock.left - self._expected()) - looking
        # a step of every layer is a pass over the network and back, of 32 samples
        steps = int(min(MOST_STEPS, max(left, 0.0) / (3 * 32 * a_sample)))
        if steps < FEWEST_STEPS:
            self.journal.add("note", text="the budget leaves no time to learn how weights are rounded")
            return None
        return with_learned_rounding(recipe, steps)

    def _quantized(self, recipe: Recipe) -> nn.Module:
        return quantize(self.model, self.batches, recipe, seed=self.seed, progress=False)

    def _expected(self) -> float:
        """Seconds that another trial will take, from those so far."""
        return 1.2 * max((t.seconds for t in self.trials), default=0.0) if self.best is not None else 0.0

    # -- trials ---------------------------------------------------------------------------------------------------

    def _try(
        self, rung: str, recipe: Recipe, make: Callable[[], nn.Module], assignment: dict[str, str] | None = None
    ) -> Trial:  # fmt: skip
        """Make a model, evaluate it, time it, and keep it if it is the best."""
        start = time.perf_counter()
        made = make()
        runs, score = self._score(made)
        seconds = time.perf_counter() - start
        times = run_ns({"float": self.float_run, "it": runs}, self.example, threads=self.threads, seconds=0.3)
        speedup = times["float"] / times["it"]
        formats = assignment or {}
        bops = 0.0 if self.mixer is None else self.mixer.total(formats)["bops"]
        trial = Trial(rung, recipe.name, score, self.goal.drop(self.float_score, score),
                      self.float_ns / speedup / 1e6, speedup, model_bytes(made), bops, seconds,
                      assignment=formats, recipe=recipe)  # fmt: skip
        trial.met = self.goal.met(trial)
        self._note(trial)
        if self.best is None or self._better(trial, self.best):
            self.best = trial
            self.models = {id(trial): made}
        return trial

    def _score(self, made: nn.Module) -> tuple[nn.Module, float]:
        """What runs, and its score: the planned program, or the modules where it cannot take the inputs."""
        runs: nn.Module = made
        with torch.no_grad():
            try:
                runs = compile_model(made, self.batches[0], threads=self.threads)
                return runs, float(self.evaluate(runs))
            except LowerError:
                return made, float(self.evaluate(made))
            except InputError as error:
                self.journal.add("note", text=f"evaluated layer by layer: {error.what}")
                return runs, float(self.evaluate(made))

    def _better(self, a: Trial, b: Trial) -> bool:
        """Reaching the goal first, then what is to be small; among models that do not reach it, the accepted loss."""
        if a.met != b.met:
            return a.met
        if a.met:
            return self.goal.value(a) < self.goal.value(b)
        excess = [(max(0.0, t.drop - self.goal.max_drop), self.goal.value(t)) for t in (a, b)]
        return excess[0] < excess[1]

    def _note(self, trial: Trial) -> None:
        self.trials.append(trial)
        self.journal.add("trial", trial.rung, **trial.facts())
        if self.progress:
            what = summary_of(trial.assignment) or trial.name
            print(
                f"{self.clock.spent:6.0f} s  {trial.rung:15} {what:32} score {trial.score:.4f}"
                f"  drop {trial.drop:+.4f}  {trial.latency_ms:.3f} ms ({trial.speedup:.1f} x)"
                f"  {trial.bytes:,} B  {'goal' if trial.met else ''}",
                flush=True,
            )

    # -- formats layer by layer -----------------------------------------------------------------------------------

    def _mixed(self, stopped: str) -> str:
        """Formats layer by layer: to reach the goal, or to make what reaches it cheaper."""
        reserve = 2 * self._expected()
        if not self.clock.allows(SURVEY * self._expected()):
            self.journal.add("note", text="the budget leaves no time to measure layers in each format")
            return "budget"
        mixer = self.mixer = Mixer(
            self.model, self.batches, self.base, self.formats, self.goal, self.clock, samples=self.samples,
            threads=self.threads, cache=self.cache, seed=self.seed, journal=self.journal,
        )  # fmt: skip
        for trial in self.trials:
            if trial.rung not in ("float", "run-time ranges"):
                trial.bops = mixer.total({})["bops"]
        reached = self._reached()
        if reached and not mixer.promises():
            self.journal.add(
                "note", text="no mix of formats promises to be cheaper than what reaches the goal"
            )
            return stopped
        if not mixer.measure(reached=reached, reserve=reserve):
            return "budget"
        assert self.best is not None
        fixed = max(0.0, self.best.bytes - mixer.total(self.best.assignment)["bytes"])
        return (
            self._bisect(mixer.candidates(reached=reached, fixed_bytes=fixed))
            if self.clock.left > 0
            else "budget"
        )

    def _bisect(self, ladder: Sequence[dict[str, str]]) -> str:
        """The cheapest assignment that reaches the goal, taken to be monotone in the predicted damage."""
        low, high = 0, len(ladder) - 1
        while low <= high:
            if not self.clock.allows(self._expected()):
                return "budget"
            middle = (low + high) // 2
            if self._try_mix(ladder[middle]).met:
                high = middle - 1
            else:
                low = middle + 1
        return "ladder"

    def _try_mix(self, assignment: dict[str, str]) -> Trial:
        assert self.mixer is not None
        name = f"{self.base.name}, {summary_of(assignment)}"
        recipe = replace(mixed(self.base, self.mixer.probe, assignment), name=name)
        return self._try("mixed", recipe, lambda: self._quantized(recipe), dict(assignment))

    def _learned_mix(self) -> None:
        """The mix that keeps the limits and loses least, its layers retargeted; then its rounding learned."""
        mixes = [t for t in self.trials if t.rung == "mixed" and self._keeps_limits(t)]
        best = min(mixes, key=lambda t: t.drop, default=None)
        if best is None or best.recipe is None:
            return
        if self.clock.allows(self._expected()):
            aimed = retargeted(best.recipe)
            self._try("mixed, retargeted", aimed, partial(self._quantized, aimed), best.assignment)
        recipe = None if self._reached() else self._learning(best.recipe)
        if recipe is not None:
            self._try("mixed, reconstructed", recipe, partial(self._quantized, recipe), best.assignment)

    # -- training -------------------------------------------------------------------------------------------------

    def _trained(self) -> str:
        """Train with quantization for as long as the budget lasts, in the formats that keep the limits."""
        from pennyweight.training import fit
        from pennyweight.training.prepare import prepare as prepare_training

        train = self.train
        assert train is not None
        recipe = Recipe.preset("int8-qat")
        mixes = [t for t in self.trials if t.assignment and self._keeps_limits(t)]
        formats = min(mixes, key=lambda t: t.drop).assignment if mixes and self._limited() else {}
        if formats and self.mixer is not None:
            recipe = replace(
                mixed(recipe, self.mixer.probe, formats), name=f"{recipe.name}, {summary_of(formats)}"
            )
        seconds_left = self.clock.left - 2 * self._expected()
        if seconds_left <= 0:
            return "budget"
        torch.manual_seed(self.seed)

        def make() -> nn.Module:
            model = prepare_training(self.model, self.batches[0], recipe)
            calibrate(model, self.batches, progress=False)
            started, first = time.perf_counter(), next(iter(train()))
            timed = copy.deepcopy(model)
            fit(timed, lambda: [first] * 2, epochs=1, loss=self.loss, reestimate=0, progress=False)
            a_step = max((time.perf_counter() - started) / 2, 1e-4)
            steps = max(1, int(min(seconds_left, 3600.0) * 0.8 / a_step))
            steps = min(steps, self.train_steps or steps)
            batches = limited(train, steps)
            fit(model, batches, epochs=1, steps_per_epoch=steps, lr=0.002, loss=self.loss, teacher=self.model,
                reestimate=min(50, steps), progress=False)  # fmt: skip
            return convert(model)

        self._try("trained", recipe, make, dict(formats))
        return "ladder"

    def _limited(self) -> bool:
        return self.goal.limit_size is not None or self.goal.limit_latency is not None

    def _keeps_limits(self, trial: Trial) -> bool:
        return self.goal.met(replace(trial, drop=0.0))

    # -- the end --------------------------------------------------------------------------------------------------

    def _done(self, stopped: str) -> Tuning:
        assert self.best is not None
        model = self.models[id(self.best)]
        front = pareto(self.trials, self.goal)
        for trial in front:
            self.journal.add("front", trial.rung, **trial.facts())
        goal = {k: getattr(self.goal, k) for k in self.goal.__dataclass_fields__}
        self.journal.add("chosen", self.best.rung, **self.best.facts(), stopped=stopped, elapsed=self.clock.spent,
                         goal=goal)  # fmt: skip
        own = state(model).journal
        own.events.extend(self.journal.events)
        mixer = self.mixer
        known = None if mixer is None or not mixer.known.rows else mixer.known
        return Tuning(model, self.best, self.best.recipe, self.best.met, self.goal, self.trials, front, known,
                      None if mixer is None else mixer.costs, stopped, self.clock.spent, self.journal)  # fmt: skip

"""Quantize, measure, keep in float what float does faster here, and quantize again."""

from __future__ import annotations

import glob
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from pennyweight.errors import LowerError, NothingQuantized
from pennyweight.graph import ops
from pennyweight.graph.record import call
from pennyweight.journal import Journal
from pennyweight.measure import interleaved
from pennyweight.pipeline import State, state
from pennyweight.plan import Plan
from pennyweight.profiling import arrays_of, hooked_times, profile, session_of
from pennyweight.recipe import Recipe

ROUNDS = 3  # keeping a layer can make its neighbours slower: they convert for it
LOSS = 0.005  # of a run's time, from which on a layer is worth keeping in float
MARGIN = 1.05
WORTH = 1.01  # times faster that a whole run must become

Make = Callable[[Recipe], nn.Module]


def without_slow_layers(
    model: nn.Module, recipe: Recipe, make: Make, *, threads: int = 0, seconds: float = 1.0
) -> nn.Module:
    """The quantized model whose layers are all faster than in float on this machine, as far as measuring tells.

    Each round measures the quantized model beside the float one, layer by layer, keeps those in float that lose more
    than half a percent of a run, quantizes again, and times both versions in turns: what makes the whole run no faster
    is taken back. Models without a whole-graph form are measured under hooks, layer by layer as they run eagerly.

    Args:
        model: the float model.
        recipe: what to begin with.
        make: quantizes the model with a recipe.
        threads: to measure with; 0 for as many as torch uses now.
        seconds: to spend on each side of each measurement, at least.

    Returns:
        The last version that was faster than those before. Its journal has a `slow` event for each layer found, with
        both times and whether it was kept in float, and a `kept slow layers` event for each round.

    Raises:
        NothingQuantized: if every layer is faster in float.
    """
    threads = threads or torch.get_num_threads()
    best, kept = make(recipe), list[str]()
    events = Journal()
    # all rules matched something; the layer that one of them was for may now be kept
    relaxed = replace(recipe, rules=tuple(replace(rule, optional=True) for rule in recipe.rules))
    for _ in range(ROUNDS):
        found = slow_layers(best, model, threads, seconds)
        new = {name: times for name, times in found.items() if name not in kept}
        if not new:
            break
        try:
            candidate = make(relaxed.keep(*(glob.escape(name) for name in [*kept, *new])))
        except NothingQuantized as error:
            raise NothingQuantized(
                "every layer of this model is faster in float on this machine",
                site=type(model).__name__,
                hint="Quantize it for its size alone, without keep_slow_layers_float.",
            ) from error
        gain = speedup(candidate, best, threads, seconds)
        accepted = gain >= WORTH
        for name, times in new.items():
            events.add("slow", name, **times, kept=accepted)
        events.add("kept slow layers", "", layers=len(new), speedup=gain, accepted=accepted)
        if not accepted:
            break
        best = candidate
        kept += new
    state(best).journal.events.extend(events.events)
    return best


def slow_layers(
    quantized: nn.Module, model: nn.Module, threads: int, seconds: float
) -> dict[str, dict[str, Any]]:
    """Layers of the plan that float does faster: by name, both times in microseconds and the kernel that ran."""
    found = state(quantized)
    try:
        report = profile(quantized, found.example, against=model, threads=threads, seconds=seconds)
    except LowerError:
        return _slow_eagerly(quantized, model, found, threads)
    layers: dict[str, dict[str, Any]] = {}
    for layer in report.slower_than_float:
        if layer.float_ns is None or layer.ns - layer.float_ns < LOSS * report.plain_ns:
            continue
        for step in layer.steps:
            name = owner(found.plan, step.site)
            if name:
                layers[name] = {
                    "us": layer.ns / 1e3,
                    "float_us": layer.float_ns / 1e3,
                    "kernel": layer.kernel,
                }
    return layers


def _slow_eagerly(
    quantized: nn.Module, model: nn.Module, found: State, threads: int
) -> dict[str, dict[str, Any]]:
    mine = hooked_times(quantized, found.example, threads)
    theirs = hooked_times(model, found.example, threads)
    total = sum(mine.values())
    return {
        name: {"us": mine[name] / 1e3, "float_us": theirs[name] / 1e3, "kernel": "eager"}
        for name in mine
        if owner(found.plan, name) == name
        and name in theirs
        and mine[name] > MARGIN * theirs[name]
        and mine[name] - theirs[name] >= LOSS * total
    }


def owner(plan: Plan, site: str) -> str:
    """The layer of a plan that a site belongs to, if a rule of its own decides about it; else ""."""
    while site and site not in plan.layers:
        site = site.rpartition(".")[0]
    layer = plan.layers.get(site)
    products = ops.MATMULS | ops.ATTENTION
    return site if layer is not None and (layer.weight is not None or layer.kind in products) else ""


def speedup(candidate: nn.Module, best: nn.Module, threads: int, seconds: float) -> float:
    """How many times faster a run of the candidate is, timed in turns."""
    calls = {name: _call(m, threads) for name, m in (("candidate", candidate), ("best", best))}
    times: Mapping[str, Any] = interleaved(calls, seconds=seconds)
    return float(times["candidate"].speedup_over(times["best"]))


def _call(model: nn.Module, threads: int) -> Callable[[], Any]:
    example = state(model).example
    try:
        session = session_of(model, example, threads=threads)
    except LowerError:

        def eagerly() -> Any:
            with torch.inference_mode():
                return call(model, example)

        return eagerly
    inputs = session.checked((arrays_of(session, example),))
    return lambda: session.engine.run(inputs)

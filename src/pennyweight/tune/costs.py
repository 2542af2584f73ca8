"""What each layer costs in each format: nanoseconds measured on this machine, bytes, and bit operations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from pennyweight.errors import LowerError, PennyweightError
from pennyweight.journal import Journal
from pennyweight.pipeline import quantize
from pennyweight.profiling import arrays_of, session_of
from pennyweight.recipe import Recipe
from pennyweight.runtime.profile import Times, by_site, time_steps
from pennyweight.tune.formats import layer_formats
from pennyweight.tune.probe import Probe

SURE = 0.75  # of the paired runs in which a format must be faster than int8, to count as faster


@dataclass
class Costs:
    """By `layer|format`.

    Attributes:
        ns: measured; empty where the model has no whole-graph form.
        bytes: of weights with their scales.
        macs: multiply-adds of a sample by layer.
        ns_per_value: of turning a float into a code, measured.
        threads: that it was measured with.
    """

    ns: dict[str, float] = field(default_factory=dict)
    bytes: dict[str, float] = field(default_factory=dict)
    macs: dict[str, float] = field(default_factory=dict)
    ns_per_value: float = 0.0
    threads: int = 0

    def of(self, layer: str, form: str) -> dict[str, float]:
        """Costs of one layer in one format, by name. `bops = macs * weight bits * input bits`."""
        chosen = layer_formats[form]
        key = f"{layer}|{form}"
        found = {"bytes": self.bytes.get(key, 0.0)}
        found["bops"] = self.macs.get(layer, 0.0) * chosen.weight * chosen.input
        if self.ns:
            found["ns"] = self.ns.get(key, self.ns.get(f"{layer}|int8", 0.0))
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    def write(self, journal: Journal, layers: Sequence[str], formats: Sequence[str]) -> None:
        """One `cost` event a layer and format."""
        for layer in layers:
            for form in formats:
                if f"{layer}|{form}" in self.bytes:
                    journal.add("cost", layer, form=form, **self.of(layer, form))


def single(example: Any, batch: int) -> Any:
    """The example with its common first axis cut or repeated to `batch`; as it is where there is none."""
    rows = {len(t) for t in torch.utils._pytree.tree_leaves(example) if isinstance(t, Tensor) and t.ndim}
    if len(rows) != 1 or not batch:
        return example
    have = rows.pop()

    def fit(x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.ndim:
            return x
        return x.repeat(-(-batch // have), *[1] * (x.ndim - 1))[:batch].contiguous()

    return tree_map(fit, example)


def measured_costs(
    model: nn.Module,
    probe: Probe,
    batches: Sequence[Any],
    recipe: Recipe,
    *,
    batch: int = 1,
    threads: int = 0,
    seconds: float = 0.5,
) -> Costs:
    """Time the whole model uniformly in each format, step by step and in turns, and share the steps among layers.

    Args:
        model: the float model.
        probe: of it.
        batches: calibration data; only scales depend on them, so that two batches do.
        recipe: what "int8" means.
        batch: samples a run.
        threads: of the engine; 0 for as many as torch uses now.
        seconds: to spend on each format, at least.
    """
    threads = threads or torch.get_num_threads()
    example = single(batches[0], batch)
    costs = Costs(threads=threads)
    for layer in probe.layers:
        for form in probe.choices(layer):
            costs.bytes[f"{layer}|{form}"] = _bytes(probe, layer, form)
    for node in probe.graph:
        if node.name in probe.layers and node.outputs:
            rows = max(_rows(batches[0]), 1)
            widths = [m.shape[1] for m in probe.matrices.get(node.name, {}).values()]
            macs = float(np.prod(node.outputs[0].shape)) * (max(widths, default=0))
            costs.macs[node.name] = costs.macs.get(node.name, 0.0) + macs / rows
    sessions = {}
    for form in probe.formats:
        try:
            session = session_of(uniform(model, probe, form, batches[:2], recipe), example, threads=threads)
        except LowerError:
            return costs
        sessions[form] = (session, arrays_of(session, example))
    times = time_steps(sessions, seconds=seconds)
    known = {s.site for found in times.values() for s in found.steps if layer_of(probe, s.site)}
    costs.ns = settled(
        {form: by_layer(by_site(found, known), partial(layer_of, probe)) for form, found in times.items()}
    )
    costs.ns_per_value = _rounding(times)
    return costs


def by_layer(sites: Mapping[str, Any], layer: Callable[[str], str]) -> dict[str, Any]:
    """Nanoseconds [runs] of every layer, of those of its sites."""
    found: dict[str, Any] = {}
    for site, samples in sites.items():
        if name := layer(site):
            found[name] = found[name] + samples if name in found else samples
    return found


def settled(samples: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Medians by `layer|format`. What is not faster than int8 in three quarters of the paired runs is not faster.

    Of many layers and formats some look faster by chance, and a search would pick just these.

    Args:
        samples: nanoseconds [runs] by format and layer, measured in turns.
    """
    base = samples.get("int8", {})
    found: dict[str, float] = {}
    for form, layers in samples.items():
        for layer, mine in layers.items():
            ns = float(np.median(mine))
            if form != "int8" and layer in base:
                runs = min(len(mine), len(base[layer]))
                usual = float(np.median(base[layer]))
                if ns < usual and float(np.mean(mine[:runs] < base[layer][:runs])) < SURE:
                    ns = usual
            found[f"{layer}|{form}"] = ns
    return found


def uniform(model: nn.Module, probe: Probe, form: str, batches: Sequence[Any], recipe: Recipe) -> nn.Module:
    """The model with every layer in one format, as far as it can have it; int8 otherwise."""
    assignment = {n: form if form in probe.choices(n) else "int8" for n in probe.layers}
    if set(assignment.values()) == {"float32"}:
        return model
    return quantize(model, list(batches), mixed(recipe, probe, assignment), progress=False)


def mixed(recipe: Recipe, probe: Probe, assignment: Mapping[str, str]) -> Recipe:
    """The recipe with a rule in front for every layer that is not as the recipe has it."""
    rules = []
    for name, form in assignment.items():
        rule = layer_formats[form].rule(probe.plan.layers[name])
        if rule is not None:
            rules.append(rule)
    relaxed = tuple(replace(r, optional=True) for r in recipe.rules)
    return Recipe(recipe.name, (*rules, *relaxed), recipe.passes)


def layer_of(probe: Probe, site: str) -> str:
    """The layer that a step's site belongs to, or ""."""
    known = set(probe.layers)
    while site and site not in known:
        site = site.rpartition(".")[0] if "." in site else ""
    return site


def _rows(batch: Any) -> int:
    rows = {len(t) for t in torch.utils._pytree.tree_leaves(batch) if isinstance(t, Tensor) and t.ndim}
    return rows.pop() if len(rows) == 1 else 1


def _bytes(probe: Probe, layer: str, form: str) -> float:
    """Of the weight in this format: packed codes with their scales, or floats."""
    total = 0.0
    for name, matrix in probe.matrices.get(layer, {}).items():
        solved = probe.solved(layer, name, form)
        if solved is None:
            total += 4 * matrix.numel()
        elif hasattr(solved.weight, "nbytes"):
            total += solved.weight.nbytes
        else:
            total += 2 * matrix.numel()
    return total


def _rounding(times: Mapping[str, Times]) -> float:
    """Nanoseconds a value of the steps that only turn floats into codes: 5 bytes are read and written for each."""
    found = [
        (s.ns, s.bytes)
        for t in times.values()
        for s in t.steps
        if s.op in ("quantize", "dequantize") and s.bytes
    ]
    total = sum(b for _, b in found)
    return 5 * sum(ns for ns, _ in found) / total if total else 0.0


def run_ns(
    models: Mapping[str, nn.Module], example: Any, *, threads: int, seconds: float
) -> dict[str, float]:
    """Median nanoseconds of a run of each model, in turns, on the engine; eagerly where there is no whole-graph form.

    Raises:
        PennyweightError: if a model fails.
    """
    from pennyweight.graph.record import call
    from pennyweight.measure import interleaved

    calls: dict[str, Any] = {}
    for name, model in models.items():
        try:
            session = session_of(model, example, threads=threads)
        except LowerError:

            def eagerly(m: nn.Module = model) -> Any:
                with torch.inference_mode():
                    return call(m, example)

            calls[name] = eagerly
            continue
        inputs = session.checked((arrays_of(session, example),))
        calls[name] = lambda s=session, x=inputs: s.engine.run(x)
    if not calls:
        raise PennyweightError("there is no model to time")
    times = interleaved(calls, seconds=seconds)
    first = times[next(iter(calls))]
    # ratios of paired blocks, on the first one's median: what the machine did meanwhile cancels
    return {
        name: first.p50 / t.speedup_over(first) if t is not first else first.p50 for name, t in times.items()
    }

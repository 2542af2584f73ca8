"""Measure what a report shows and write it into the journal of a converted model, which is saved with it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from pennyweight.compiled import compile as compile_model
from pennyweight.diagnose import Diagnosis, diagnose
from pennyweight.diagnose.simulate import Matrix, Simulation
from pennyweight.errors import LowerError
from pennyweight.formats import grids
from pennyweight.journal import Journal
from pennyweight.measure import cpu_name
from pennyweight.pipeline import state
from pennyweight.profiling import profile
from pennyweight.tune.costs import run_ns, single

BINS = 48
KINDS = ("accuracy", "latency", "output", "histogram", "execution", "machine", "finding", "diagnosed")


def collect(
    model: nn.Module,
    quantized: nn.Module,
    batches: Iterable[Any],
    *,
    evaluate: Callable[[nn.Module], float] | None = None,
    metric: str = "score",
    causes: bool = True,
    threads: int = 0,
    seconds: float = 0.5,
    progress: bool = True,
) -> Journal:
    """Compare a converted model with its float original in every way that a report shows.

    Args:
        model: the float model.
        quantized: from `quantize`, `convert` or `tune`; its journal is added to; what an earlier call wrote goes.
        batches: inputs as the model will see them, some ten to a hundred samples.
        evaluate: quality of a model; without it the outputs alone are compared.
        metric: what that gives, for the page.
        causes: look for causes of lost accuracy, see `diagnose`.
        threads: of the engine; 0 for as many as torch uses now.
        seconds: to time each side for.
        progress: show bars.

    Returns:
        the journal of `quantized`.

    Raises:
        InputError: if there is no batch, or the model is not converted.
    """
    data = list(batches)
    threads = threads or torch.get_num_threads()
    log = state(quantized).journal
    simulation = Simulation(model, quantized, data)
    log.events[:] = [e for e in log.events if e.kind not in KINDS]
    damage = simulation.actual
    log.add("output", "", sqnr_db=damage.sqnr_db, kl=damage.kl, agree=damage.agree)
    if evaluate is not None:
        with torch.no_grad():
            log.add(
                "accuracy",
                "",
                float=float(evaluate(model)),
                quantized=float(evaluate(quantized)),
                metric=metric,
            )
    example = single(data[0], 1)
    times = run_ns({"float": model, "it": quantized}, example, threads=threads, seconds=seconds)
    log.add(
        "latency", "", float_ms=times["float"] / 1e6, ms=times["it"] / 1e6, speedup=times["float"] / times["it"],
        batch=1, threads=threads,
    )  # fmt: skip
    log.add("machine", "", cpu=cpu_name(), threads=threads)
    histograms(simulation, log)
    execution(model, quantized, example, log, threads, seconds)
    if causes:
        found: Diagnosis = diagnose(model, quantized, data, progress=progress)
        found.write(log)
    return log


def histograms(simulation: Simulation, log: Journal) -> None:
    """One `histogram` event a weight and a calibrated input: counts, the grid, and what is beyond it.

    Weights are counted in codes, `w / s` of their row, so that one grid serves all rows.
    """
    for name, weight in simulation.weights.items():
        if not isinstance(weight, Matrix) or weight.codes is None:
            continue
        values = simulation.matrices[name] / weight.scale.reshape(-1, 1)
        spec = simulation.plan.layers[name].weight
        levels = None if spec is None else grids[spec.grid].levels()
        top = float(weight.codes.abs().max()) if levels is None else float(levels.abs().max())
        _add(log, name, "weight", values.reshape(-1), -top, top, 1.0, None)
    for site, found in simulation.ranges.items():
        seen = simulation.seen.get(site)
        if seen is not None:
            values = torch.cat(seen.values)
            layer = simulation.layer_of(site)
            _add(log, layer, "input", values, found.lo, found.hi, found.scale, seen.clipped, site)


def _add(
    log: Journal, layer: str, part: str, values: Tensor, lo: float, hi: float, step: float, clipped: float | None,
    site: str = "",
) -> None:  # fmt: skip
    least, most = min(float(values.min()), lo), max(float(values.max()), hi)
    most = most if most > least else least + 1.0
    counts = torch.histc(values.float(), BINS, least, most)
    beyond = float(((values < lo - step / 2) | (values > hi + step / 2)).double().mean())
    log.add(
        "histogram", site or f"{layer}:{part}", layer=layer, part=part, least=least, most=most,
        counts=[int(c) for c in counts], lo=lo, hi=hi, step=step, clipped=beyond if clipped is None else clipped,
    )  # fmt: skip


def execution(
    model: nn.Module, quantized: nn.Module, example: Any, log: Journal, threads: int, seconds: float
) -> None:
    """One `execution` event a layer of the profile; none where the model has no whole-graph form."""
    try:
        runs = compile_model(getattr(quantized, "uncompiled", quantized), example, threads=threads)
        found = profile(runs, example, against=model, threads=threads, seconds=seconds)
    except LowerError as error:
        log.add("note", text=f"no execution report: {error.what}")
        return
    for layer in found.layers:
        log.add(
            "execution", layer.site, op=layer.op, kernel=layer.kernel, us=layer.ns / 1e3, share=100 * layer.share,
            macs=layer.macs, float_us=None if layer.float_ns is None else layer.float_ns / 1e3,
            speedup=layer.speedup, verdict=layer.verdict,
        )  # fmt: skip

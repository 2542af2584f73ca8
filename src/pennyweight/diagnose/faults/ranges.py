"""Ranges of activations that do not fit: saturated, dead, clipped logits, and data other than those calibrated with."""

from __future__ import annotations

from collections.abc import Callable

from pennyweight.diagnose.finding import Case, Finding, causes
from pennyweight.diagnose.simulate import Range, Simulation
from pennyweight.graph import ops
from pennyweight.graph.graph import Ref
from pennyweight.pipeline import quantize
from pennyweight.tune.probe import compared

CLIPPED = 0.01  # part of the values beyond a range
ENERGY = 1e-4  # of the signal, that clipping takes
USED = 0.15  # part of the codes that values reach
SAME = 0.35  # how far two ranges of the same data may differ
_END = ops.MOVES | ops.SLICES | ops.CLIPS | ops.POOLS | {"softmax", "log_softmax", "softmin"}


def reading(simulation: Simulation) -> dict[str, Ref]:
    """What every calibrated site reads."""
    found: dict[str, Ref] = {}
    for node in simulation.graph:
        layer = simulation.plan.layers.get(node.name) if node.kind in ("module", "call") else None
        for position, ref in enumerate(node.inputs if layer is not None else ()):
            if ref is not None and layer is not None and position in layer.inputs:
                found[str(layer.input_site(position))] = ref
    return found


def input_sites(simulation: Simulation) -> set[str]:
    """Sites that read the model's inputs, moved at most."""
    found = set()
    for site, start in reading(simulation).items():
        ref = start
        producer = simulation.graph.producer(ref)
        while (
            producer.kind == "call"
            and producer.op in ops.MOVES | ops.SLICES
            and producer.inputs[0] is not None
        ):
            ref = producer.inputs[0]
            producer = simulation.graph.producer(ref)
        if producer.kind == "input":
            found.add(site)
    return found


def logit_sites(simulation: Simulation) -> set[str]:
    """Sites of operations whose results reach the outputs without meeting another weight: they round the logits."""
    graph, found = simulation.graph, set()
    for node in graph:
        layer = simulation.plan.layers.get(node.name) if node.kind == "call" else None
        if layer is None or layer.weight is not None or node.op in ops.MATMULS | ops.ATTENTION:
            continue
        stack, reached, blocked = [Ref(node.id, i) for i in range(len(node.outputs))], False, False
        while stack:
            for user, _ in graph.users(stack.pop()):
                if user.kind == "output":
                    reached = True
                elif user.kind == "call" and user.op in _END | {"add", "mul", "div"}:
                    stack += [Ref(user.id, i) for i in range(len(user.outputs))]
                else:
                    blocked = True
        if reached and not blocked:
            found |= {str(layer.input_site(p)) for p in layer.inputs}
    return found


def _calibrated(simulation: Simulation, site: str) -> tuple[float, float] | None:
    """The extremes that calibration saw at a site, if the journal has them."""
    for event in reversed(simulation.journal.events):
        if event.kind == "range" and event.site == site and "lo" in event.data:
            return float(event.data["lo"]), float(event.data["hi"])
    return None


def unlike_sites(simulation: Simulation) -> dict[str, str]:
    """Inputs of the model that now have other values than when it was calibrated, with the figures."""
    found: dict[str, str] = {}
    for site in sorted(input_sites(simulation)):
        was, seen = _calibrated(simulation, site), simulation.seen.get(site)
        if was is None or seen is None or site not in simulation.ranges:
            continue
        width = max(was[1] - was[0], 1e-12)
        beyond = max(seen.hi - was[1], was[0] - seen.lo, 0.0) / width
        low, high = seen.quantiles([0.001, 0.999])
        shrunk = 1 - (max(high, 0.0) - min(low, 0.0)) / max(max(was[1], 0.0) - min(was[0], 0.0), 1e-12)
        if beyond > SAME or shrunk > 1 - SAME:
            found[site] = (
                f"inputs of {seen.lo:.3g} .. {seen.hi:.3g}; calibrated with {was[0]:.3g} .. {was[1]:.3g}"
            )
    return found


def again(simulation: Simulation) -> float:
    """SQNR of the float model quantized anew, by the same recipe, with the batches at hand."""
    made = quantize(simulation.float_model, simulation.batches, simulation.recipe, progress=False)
    return compared(simulation.wanted, simulation.outputs(made)).sqnr_db


@causes.register("calibration data unlike the inputs")
def calibration_data(case: Case) -> list[Finding]:
    """The model's inputs lie elsewhere than those it was calibrated with."""
    return [
        Finding(
            "calibration data unlike the inputs", site, what,
            "Calibrate with inputs like those the model will see, preprocessed the same way.",
            again, severity=5.0, broad=True,
        )
        for site, what in unlike_sites(case.simulation).items()
    ]  # fmt: skip


@causes.register("saturated range")
def saturated(case: Case) -> list[Finding]:
    """Values beyond the range; at the logits by a name of its own."""
    simulation, logits, found = case.simulation, logit_sites(case.simulation), []
    for site, seen in simulation.seen.items():
        now = simulation.ranges.get(site)
        if now is None or seen.clipped < CLIPPED or seen.energy < ENERGY:
            continue
        wide = Range.of(seen.lo, seen.hi, now.high)
        at_end = site in logits
        found.append(
            Finding(
                "clipped logits" if at_end else "saturated range",
                site,
                f"{100 * seen.clipped:.1f} % of the values are beyond {now.lo:.3g} .. {now.hi:.3g}, which takes "
                f"{100 * seen.energy:.2g} % of the signal; they reach {seen.lo:.3g} .. {seen.hi:.3g}",
                "Range the outputs by min-max, or keep the last operation in float."
                if at_end else "Calibrate this site with a wider range rule (minmax), or with more data.",
                _with_ranges({site: wide}),
                severity=seen.energy,
            )
        )  # fmt: skip
    return found


@causes.register("dead range")
def dead(case: Case) -> list[Finding]:
    """A range of which values use a small part: few codes are left for them."""
    simulation, found = case.simulation, []
    for site, seen in simulation.seen.items():
        now = simulation.ranges.get(site)
        if now is None:
            continue
        width = max(seen.hi, 0.0) - min(seen.lo, 0.0)
        used = width / max(now.hi - now.lo, 1e-30)
        if used >= USED or width <= 0:
            continue
        found.append(
            Finding(
                "dead range", site,
                f"values from {seen.lo:.3g} to {seen.hi:.3g} use {max(1, round(used * now.high))} of the "
                f"{now.high + 1} codes from {now.lo:.3g} to {now.hi:.3g}",
                "Calibrate this site again; look for one huge value in the calibration data (percentile, mse).",
                _with_ranges({site: Range.of(seen.lo, seen.hi, now.high)}), severity=seen.noise,
            )
        )  # fmt: skip
    return found


def _with_ranges(ranges: dict[str, Range]) -> Callable[[Simulation], float]:
    def trial(simulation: Simulation) -> float:
        """The output with other ranges at these sites, and at those tied to them."""
        tied = {
            str(other): r
            for group in simulation.plan.ties for other in group
            for site, r in ranges.items() if site in map(str, group)
        }  # fmt: skip
        with simulation.changed(ranges={**tied, **ranges}):
            return simulation.damage().sqnr_db

    return trial

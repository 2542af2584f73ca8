"""Why a quantized model is worse than its float original, and what helps: causes, each with a remedy that was tried."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from pennyweight.diagnose.finding import Case, Cause, Finding, causes
from pennyweight.diagnose.simulate import Simulation
from pennyweight.errors import InputError, PennyweightError, nearest
from pennyweight.journal import Journal
from pennyweight.progress import track

TARGETS = ("native", "no-vnni")
WORTH = 1.0  # dB that a remedy must gain to be a cause of lost accuracy
NEAR = 0.75  # of the greatest gain: a remedy at one place is preferred to one of the whole model from here on
MOST = 12  # findings that are tried


@dataclass
class Diagnosis:
    """What was found.

    Attributes:
        findings: causes, the likeliest first.
        layers: per layer, in order of execution: SQNR at the output with it alone quantized, and clipped shares.
        sqnr_db, kl, agree: of the quantized model's outputs to float's.
        simulated_db: SQNR of the simulation that remedies were tried in, on the target.
        target: what was asked about.
        notes: what could not be looked at, and why.
    """

    findings: list[Finding]
    layers: list[dict[str, Any]]
    sqnr_db: float
    kl: float
    agree: float
    simulated_db: float
    target: str
    notes: list[str] = field(default_factory=list)

    @property
    def first(self) -> Finding | None:
        """The likeliest cause; None where nothing was found."""
        return self.findings[0] if self.findings else None

    def rows(self) -> list[dict[str, Any]]:
        """Findings as table rows."""
        return [{"rank": i + 1, **f.row()} for i, f in enumerate(self.findings)]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "sqnr_db": self.sqnr_db, "kl": self.kl, "agree": self.agree, "simulated_db": self.simulated_db,
            "target": self.target, "findings": self.rows(), "layers": self.layers, "notes": self.notes,
        }  # fmt: skip

    def write(self, journal: Journal) -> None:
        """One `finding` event a cause, one `diagnosed` event a layer."""
        for row in self.rows():
            journal.add("finding", str(row["site"]), **{k: v for k, v in row.items() if k != "site"})
        for row in self.layers:
            journal.add("diagnosed", str(row["layer"]), **{k: v for k, v in row.items() if k != "layer"})

    def __str__(self) -> str:
        lines = [
            f"outputs are {self.sqnr_db:.1f} dB from float's, the greatest entry agrees on {100 * self.agree:.1f} %"
        ]
        for i, f in enumerate(self.findings):
            gain = "" if f.gain_db is None else f" [{f.gain_db:+.1f} dB when tried]"
            gain += "" if f.gain_us is None else f" [{f.gain_us:+.1f} us a run when tried]"
            lines += [f"{i + 1}. {f.cause} at {f.site}{gain}", f"   {f.what}", f"   -> {f.remedy}"]
        if not self.findings:
            lines.append("nothing stands out: what is left is the rounding noise of all layers together")
        return "\n".join(lines + self.notes)


def diagnose(
    model: nn.Module,
    quantized: nn.Module,
    batches: Iterable[Any],
    *,
    target: str = "native",
    layers: bool = True,
    progress: bool = True,
    journal: Journal | None = None,
) -> Diagnosis:
    """Compare a quantized model with its float original layer by layer, name what is wrong, and try what helps.

    Causes are looked for in the float model's values at every quantized site, in the codes and in the plan; then the
    remedy of each is tried in a simulation of the quantized model, and the gain at the output is measured. Causes of
    lost accuracy come first, by gain; where a change at one place gains nearly as much as one of the whole model, the
    place is named. Causes that cost time alone, or other runtimes, come after.

    Args:
        model: the float model, as it was quantized.
        quantized: from `quantize` or `convert`.
        batches: inputs as the model will see them; some ten to a hundred samples.
        target: "native", the engine here, which never saturates; or "no-vnni", x86 runtimes that add products of bytes
            in 16 bits.
        layers: also measure each layer alone (one run a layer).
        progress: show a bar.
        journal: filled if given.

    Raises:
        InputError: if there is no batch, the target is unknown, or the model is not converted.
        PennyweightError: if `quantized` did not come from this package.

    >>> print(pw.diagnose(model, quantized, batches))          # doctest: +SKIP
    """
    if target not in TARGETS:
        raise InputError(f"there is no target {target!r}", hint=nearest(target, TARGETS, "targets"))
    simulation = Simulation(model, quantized, list(batches))
    case = Case(simulation, target)
    found: list[Finding] = []
    for name in track(list(causes), "causes", show=progress):
        found += causes[name](case)
    baseline = _baseline(simulation, target)
    found.sort(key=lambda f: -f.severity)
    for finding in track(found[:MOST], "remedies", show=progress):
        _tried(finding, simulation, baseline, case)
    rows = _layers(simulation, progress) if layers else []
    diagnosis = Diagnosis(
        ranked(found), rows, simulation.actual.sqnr_db, simulation.actual.kl, simulation.actual.agree, baseline, target,
        case.notes,
    )  # fmt: skip
    if abs(simulation.actual.sqnr_db - simulation.simulated.sqnr_db) > 3 and simulation.actual.sqnr_db < 60:
        diagnosis.notes.append(
            f"the simulation is {simulation.simulated.sqnr_db:.1f} dB from float, the model itself "
            f"{simulation.actual.sqnr_db:.1f}: layers that are not simulated (recurrent, attention) do the rest"
        )
    if journal is not None:
        diagnosis.write(journal)
    return diagnosis


def _baseline(simulation: Simulation, target: str) -> float:
    """SQNR of the simulation, on the target."""
    if target == "native":
        return simulation.simulated.sqnr_db
    from pennyweight.diagnose.faults.overflow import exposed, saturating

    with saturating(simulation, exposed(simulation)):
        return simulation.damage().sqnr_db


def _tried(finding: Finding, simulation: Simulation, baseline: float, case: Case) -> None:
    """Measure what a remedy gains."""
    try:
        if finding.trial is not None:
            finding.gain_db = finding.trial(simulation) - baseline
        if finding.timing is not None:
            finding.gain_us = finding.timing(simulation)
    except PennyweightError as error:
        case.notes.append(
            f"the remedy of {finding.cause!r} at {finding.site} could not be tried: {error.what}"
        )


def ranked(findings: list[Finding]) -> list[Finding]:
    """By measured gain; local remedies before broad ones that gain little more, then what costs no accuracy.

    Layers that merely mind their bits come last: some layer always makes most of the noise.
    """
    general = [f for f in findings if f.cause == "sensitive layer"]
    specific = [f for f in findings if f not in general]
    lossy = [f for f in specific if f.gain_db is not None and f.gain_db >= WORTH]
    rest = [f for f in specific if f not in lossy]
    best = max((f.gain_db or 0.0 for f in lossy), default=0.0)
    near = [f for f in lossy if (f.gain_db or 0.0) >= NEAR * best and not f.broad]
    lossy.sort(key=lambda f: (bool(near) and f not in near, -(f.gain_db or 0.0)))
    rest.sort(key=lambda f: (-(f.gain_us or 0.0), -f.severity))
    general.sort(key=lambda f: -(f.gain_db or 0.0))
    return [*lossy, *rest, *general]


def _layers(simulation: Simulation, progress: bool) -> list[dict[str, Any]]:
    """SQNR with each layer alone quantized, and what its input loses by clipping."""
    rows = []
    order = dict.fromkeys(n.name for n in simulation.graph if n.kind in ("module", "call"))
    names = [n for n in order if n in simulation.plan.layers]
    for name in track(names, "layers", show=progress):
        layer = simulation.plan.layers[name]
        seen = [simulation.seen[str(s)] for s in layer.sites() if str(s) in simulation.seen]
        row: dict[str, Any] = {"layer": name, "kind": layer.kind, "weight": str(layer.weight or "")}
        row["alone_db"] = simulation.alone(name).sqnr_db
        if name in simulation.weights and layer.inputs:
            row["weight_db"] = simulation.alone(name, inputs=False).sqnr_db
            row["inputs_db"] = simulation.alone(name, weight=False).sqnr_db
        row["clipped"] = max((s.clipped for s in seen), default=0.0)
        rows.append(row)
    return rows


__all__ = ["TARGETS", "Case", "Cause", "Diagnosis", "Finding", "Simulation", "causes", "diagnose", "ranked"]

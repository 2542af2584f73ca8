"""The execution report: which kernel ran for each layer, how long, how near to what the machine can do.

Compared with the same layer in float, it says whether quantizing the layer pays.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pennyweight.errors import InputError
from pennyweight.measure import cpu_name
from pennyweight.program.ir import Array
from pennyweight.runtime.peaks import Peaks
from pennyweight.runtime.session import Session

PAYS, EVEN, SLOWER, BANDWIDTH, OVERHEAD = (
    "pays",
    "no faster",
    "slower than float",
    "bandwidth bound",
    "overhead",
)
MOST = 0.75  # of the runs in which a layer must be slower, to be called so
MARGIN = 1.05  # of times that count as different
NEAR = 0.5  # of the bandwidth, from which on it is what bounds a layer
# namespaces of kernels' symbols that are not called as their instruction set
_SETS = {"avx512": "avx512vnni"}
# what products of kernels are of, by parts of their symbols; int8 in all others
_ARITHMETIC = (("bf16", "bf16"), ("bit_gemm", "bits"), ("f32", "f32"), ("gemm_codes", "f32"))
_LAYERS = frozenset({"embedding", "decode"})  # without multiply-adds, but quantized by a rule of their own
# work that exists because of codes and layouts alone
_AROUND = frozenset(
    {"quantize", "dequantize", "dynamic_quantize", "padding", "transpose", "reshape", "cast", "copy", ""}
)


@dataclass(frozen=True)
class StepTime:
    """One step of the plan: what it does, and its time.

    Attributes:
        op: ops joined by "+"; site: of its main op; kernel: symbol that ran; ns: nanoseconds; macs: multiply-adds;
        bytes: of the tensors read and written; tasks: pieces that threads share.
    """

    op: str
    site: str
    kernel: str
    ns: float
    macs: int
    bytes: int
    tasks: int


@dataclass(frozen=True)
class LayerTime:
    """The steps of one layer, together.

    Attributes:
        site: module path, or `path:call`; "" for what the model does outside of its modules.
        steps: in order.
        ns: the sum of their times.
        share: of the wall time of the run.
        attainable_ns: what the machine would need at its peak: for each step the longer of multiply-adds at the peak
            of the kernel's instruction set and bytes at the bandwidth of the smallest cache that holds them. None
            where the machine was not measured.
        bound: the longer side of most of it: "compute", "L2", "L3" or "memory"; "" where not measured.
        float_ns: of the same layer in float; None where there is nothing to compare it with.
        verdict: "pays", "no faster", "slower than float", "bandwidth bound" (it pays, and waits for memory), "overhead"
            (moves, pads or rounds where float has less or no such work); "" where nothing can be said.
    """

    site: str
    steps: tuple[StepTime, ...]
    ns: float
    share: float
    attainable_ns: float | None
    bound: str
    float_ns: float | None
    verdict: str

    @property
    def op(self) -> str:
        """What its longest step does."""
        return self._main.op

    @property
    def kernel(self) -> str:
        """The symbol of the kernel of its longest step."""
        return self._main.kernel

    @property
    def macs(self) -> int:
        """Multiply-adds."""
        return sum(s.macs for s in self.steps)

    @property
    def bytes(self) -> int:
        """Bytes read and written by its steps."""
        return sum(s.bytes for s in self.steps)

    @property
    def macs_per_second(self) -> float:
        """Multiply-adds a second."""
        return 1e9 * self.macs / max(self.ns, 1.0)

    @property
    def bytes_per_second(self) -> float:
        """Bytes a second."""
        return 1e9 * self.bytes / max(self.ns, 1.0)

    @property
    def of_peak(self) -> float | None:
        """Fraction of what the machine can do."""
        return None if self.attainable_ns is None else self.attainable_ns / max(self.ns, 1.0)

    @property
    def speedup(self) -> float | None:
        """How many times faster than in float."""
        return None if self.float_ns is None else self.float_ns / max(self.ns, 1.0)

    @property
    def _main(self) -> StepTime:
        return max(self.steps, key=lambda s: s.ns)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "site": self.site, "op": self.op, "kernel": self.kernel, "ns": self.ns, "share": self.share,
            "macs": self.macs, "macs_per_second": self.macs_per_second, "bytes": self.bytes,
            "bytes_per_second": self.bytes_per_second, "of_peak": self.of_peak, "bound": self.bound,
            "float_ns": self.float_ns, "speedup": self.speedup, "verdict": self.verdict,
            "steps": [vars(s) | {} for s in self.steps],
        }  # fmt: skip


@dataclass(frozen=True)
class Profile:
    """Where the time of a run goes.

    Attributes:
        layers: in order of execution.
        wall_ns: a run with its steps timed, as its caller sees it; like all times here the median.
        plain_ns: a run without, measured in turns with the former.
        around_ns: within the engine, outside of steps: memory and threads borrowed and given back.
        coverage: the part of the wall time that layers account for, by the runs' median.
        named: the same with `around_ns`; what is left is the call from Python.
        runs: how many were timed.
        threads, backend, isa, cpu: what ran where.
        float_source: how float times were measured; "" where they were not.
        float_wall_ns: the whole run in float.
        calibrated: whether the machine's peaks were known.
    """

    layers: tuple[LayerTime, ...]
    wall_ns: float
    plain_ns: float
    around_ns: float
    coverage: float
    named: float
    runs: int
    threads: int
    backend: str
    isa: str
    cpu: str
    float_source: str = ""
    float_wall_ns: float | None = None
    calibrated: bool = False

    @property
    def slower_than_float(self) -> list[LayerTime]:
        """Layers that float would run faster, the worst loss first."""
        slow = [layer for layer in self.layers if layer.verdict == SLOWER]
        return sorted(slow, key=lambda layer: (layer.float_ns or 0) - layer.ns)

    def rows(self) -> list[dict[str, Any]]:
        """As table rows, one per layer, and what lies around them."""
        rows: list[dict[str, Any]] = []
        for layer in self.layers:
            row: dict[str, Any] = {"layer": layer.site or "(model)", "op": layer.op, "kernel": layer.kernel}
            row |= {"us": round(layer.ns / 1e3, 1), "%": round(100 * layer.share, 1)}
            row |= {"GMAC/s": round(layer.macs_per_second / 1e9, 1)}
            row |= {"GB/s": round(layer.bytes_per_second / 1e9, 1)}
            if self.calibrated:
                row |= {"% of peak": round(100 * (layer.of_peak or 0), 1), "bound": layer.bound}
            if self.float_source:
                row["float us"] = "" if layer.float_ns is None else round(layer.float_ns / 1e3, 1)
                row["x"] = "" if layer.speedup is None else round(layer.speedup, 2)
            rows.append(row | {"verdict": layer.verdict})
        empty = dict.fromkeys(rows[0], "") if rows else {}
        for name, part in (
            ("(threads and memory)", self.named - self.coverage),
            ("(call from Python)", 1 - self.named),
        ):
            us = round(part * self.wall_ns / 1e3, 1)
            rows.append(empty | {"layer": name, "us": us, "%": round(100 * part, 1)})
        return rows

    def summary(self) -> str:
        """One line: the time of a run, and how much of it is named."""
        text = f"{self.plain_ns / 1e6:.3f} ms a run on {self.backend}"
        text += f" ({self.isa}, {self.threads} threads), {100 * self.named:.1f} % of it named, "
        text += f"{100 * self.coverage:.1f} % in layers"
        if self.float_wall_ns is not None:
            text += f"; float: {self.float_wall_ns / 1e6:.3f} ms, {self.float_source}"
        if not self.calibrated:
            text += "; no peaks known: pennyweight doctor --calibrate"
        return text

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, for reports."""
        return {**vars(self), "layers": [layer.to_dict() for layer in self.layers]}


@dataclass(frozen=True)
class Times:
    """Times of one session's runs, in nanoseconds.

    Attributes:
        steps: with the median of their times.
        samples: [runs, steps].
        walls: [runs], of the calls with their steps timed; plain: [calls], of those without.
        around: [runs], the engine's work outside of steps.
    """

    steps: tuple[StepTime, ...]
    samples: Array
    walls: Array
    plain: Array
    around: Array

    @property
    def coverage(self) -> float:
        """The part of the wall time that steps account for: the median over the runs."""
        return float(np.median(self.samples.sum(1) / np.maximum(self.walls, 1)))

    @property
    def named(self) -> float:
        """The same, with what the engine does around the steps."""
        return float(np.median((self.samples.sum(1) + self.around) / np.maximum(self.walls, 1)))


def time_steps(
    sessions: Mapping[str, tuple[Session, Mapping[str, Any]]], *, seconds: float = 1.0, rounds: int = 5
) -> dict[str, Times]:
    """Time the steps of sessions on inputs, in turns, so that all see the same machine.

    A round gives each session one run that is not counted, then up to eight: every second one with its steps timed.

    Args:
        sessions: by name, with the inputs by name.
        seconds: to spend on each, at least.
        rounds: at least.
    """
    given = {name: (s, s.checked((dict(inputs),))) for name, (s, inputs) in sessions.items()}
    timed: dict[str, list[tuple[list[int], int, int]]] = {name: [] for name in given}
    plain: dict[str, list[int]] = {name: [] for name in given}
    order, done, start = list(given), 0, time.perf_counter()
    while done < rounds or time.perf_counter() - start < seconds * len(given):
        for name in order:
            session, inputs = given[name]
            session.engine.run(inputs)
            for _ in range(4):
                before = time.perf_counter_ns()
                session.engine.run(inputs)
                plain[name].append(time.perf_counter_ns() - before)
                timed[name].append(session.engine.timed(inputs))
                if time.perf_counter_ns() - before > 50_000_000:
                    break
        order.reverse()
        done += 1
    return {name: _times(*given[name], timed[name], plain[name]) for name in given}


def _times(
    session: Session,
    inputs: Mapping[str, Any],
    timed: Sequence[tuple[list[int], int, int]],
    plain: Sequence[int],
) -> Times:
    what = session.engine.steps(inputs)
    samples = np.array([ns for ns, _, _ in timed], np.float64).reshape(len(timed), len(what))
    steps = tuple(StepTime(**w, ns=float(t)) for w, t in zip(what, np.median(samples, 0), strict=True))
    walls = np.array([wall for _, _, wall in timed], np.float64)
    around = np.array([a for _, a, _ in timed], np.float64)
    return Times(steps, samples, walls, np.array(plain, np.float64), around)


def profile_session(
    session: Session,
    inputs: Mapping[str, Any],
    *,
    against: Session | None = None,
    float_times: Mapping[str, float] | None = None,
    float_source: str = "",
    peaks: Peaks | None = None,
    seconds: float = 1.0,
) -> Profile:
    """Run a session for a while and say where the time goes.

    Args:
        session: what to look at.
        inputs: arrays by name.
        against: the same model in float, on the same inputs, to be timed in turns.
        float_times: instead of that, nanoseconds by site.
        float_source: how those were measured.
        peaks: of this machine.
        seconds: to spend on each session, at least.

    Raises:
        InputError: if the inputs do not fit, or both kinds of float times are given.
    """
    if against is not None and float_times is not None:
        raise InputError("float times are either measured here or given")
    sessions = {"": (session, inputs)}
    if against is not None:
        sessions["float"] = (against, dict(zip(against.program.inputs, inputs.values(), strict=True)))
        float_source = f"the float program on the same engine ({against.backend})"
    found = time_steps(sessions, seconds=seconds)
    mine, theirs = found[""], found.get("float")
    floats: dict[str, Array] | None = None
    if theirs is not None:
        floats = by_site(theirs, {s.site for s in mine.steps})
    elif float_times is not None:
        floats = {site: np.array([ns]) for site, ns in float_times.items()}
    return Profile(
        layers=tuple(_layers(mine, floats, peaks, session)),
        wall_ns=float(np.median(mine.walls)),
        plain_ns=float(np.median(mine.plain)),
        around_ns=float(np.median(mine.around)),
        coverage=mine.coverage,
        named=mine.named,
        runs=len(mine.walls),
        threads=session.engine.threads,
        backend=session.backend,
        isa=session.engine.isa,
        cpu=cpu_name(),
        float_source=float_source if floats is not None else "",
        float_wall_ns=None if theirs is None else float(np.median(theirs.plain)),
        calibrated=peaks is not None,
    )


def by_site(times: Times, known: set[str]) -> dict[str, Array]:
    """Nanoseconds [runs] of float steps by the sites of the quantized ones.

    A step of a site that quantizing has dissolved (an activation, a norm, a sum that went into the epilogue of a
    product) counts with the layer before it, as its integer form does. Function calls have names of their own only
    where they are quantized; in float they count with the module that makes them.
    """
    owners = {s.partition(":")[0] for s in known}
    found: dict[str, Array] = {}
    last = ""
    for i, step in enumerate(times.steps):
        if step.site in known or step.site in owners:
            last = step.site
        found[last] = found.get(last, 0.0) + times.samples[:, i]
    return found


def _layers(
    times: Times, floats: Mapping[str, Array] | None, peaks: Peaks | None, session: Session
) -> list[LayerTime]:
    groups: dict[str, list[int]] = {}
    for i, step in enumerate(times.steps):
        site = step.site
        if floats is not None and site not in floats:
            site = site.partition(":")[0]
        groups.setdefault(site, []).append(i)
    total = float(sum(s.ns for s in times.steps)) or 1.0
    layers = []
    for site, indices in groups.items():
        steps = [times.steps[i] for i in indices]
        samples = times.samples[:, indices].sum(1)
        attainable, bound = None, ""
        if peaks is not None:
            attainable, bound = _attainable(steps, peaks, session.engine.threads)
        other = None if floats is None else floats.get(site)
        ns, float_ns = sum(s.ns for s in steps), None if other is None else float(np.median(other))
        slower = other is not None and ns > MARGIN * float(np.median(other)) and _mostly_above(samples, other)
        verdict = _verdict(steps, ns, attainable, bound, float_ns, slower)
        share = times.coverage * ns / total
        layers.append(LayerTime(site, tuple(steps), ns, share, attainable, bound, float_ns, verdict))
    return layers


def _mostly_above(mine: Array, theirs: Array) -> bool:
    """Whether nearly all runs are slower than the others' in their order: not just a disturbance of some."""
    n = min(len(mine), len(theirs)) if len(theirs) > 1 else len(mine)
    return bool(np.mean(mine[:n] > theirs[:n] if len(theirs) > 1 else mine > theirs) >= MOST)


def _attainable(steps: Sequence[StepTime], peaks: Peaks, threads: int) -> tuple[float, str]:
    """Nanoseconds at the machine's peak, and what bounds most of them."""
    sides: dict[str, float] = {}
    for step in steps:
        count = max(1, min(threads, step.tasks))
        space, _, symbol = step.kernel.rpartition("::")
        kind = next((kind for part, kind in _ARITHMETIC if part in symbol), "int8")
        compute = step.macs / peaks.compute(kind, _SETS.get(space, space), count)
        level, rate = peaks.bandwidth(step.bytes, count)
        side, seconds = ("compute", compute) if compute >= step.bytes / rate else (level, step.bytes / rate)
        sides[side] = sides.get(side, 0.0) + 1e9 * seconds
    return sum(sides.values()), max(sides, key=lambda s: sides[s])


def _verdict(
    steps: Sequence[StepTime],
    ns: float,
    attainable: float | None,
    bound: str,
    float_ns: float | None,
    slower: bool,
) -> str:
    layer = any(s.macs or _LAYERS & set(_kinds(s)) for s in steps)
    if slower:
        return SLOWER if layer else OVERHEAD
    if not float_ns and all(set(_kinds(s)) <= _AROUND for s in steps):
        return OVERHEAD
    if attainable is not None and bound != "compute" and attainable >= NEAR * ns:
        return BANDWIDTH
    if float_ns is None:
        return ""
    return PAYS if ns < float_ns else EVEN


def _kinds(step: StepTime) -> list[str]:
    return [part.strip().partition(":")[0] for part in step.op.split("+")]

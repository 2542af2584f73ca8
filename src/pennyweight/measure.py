"""Measuring on this machine: latencies of alternating calls, peak memory of child processes, load times."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pennyweight.errors import PennyweightError

BLOCK_NS = 20_000_000  # aim of one block of consecutive calls
MOST_CALLS = 32  # in one block


@dataclass(frozen=True, slots=True)
class Latency:
    """What was measured of one call.

    Attributes:
        p50: median, in nanoseconds.
        p95: 95th percentile.
        calls: how many were measured.
        blocks: median of each block, in the order of the rounds, to be paired with another call's.
    """

    p50: float
    p95: float
    calls: int
    blocks: tuple[float, ...]

    @property
    def ms(self) -> float:
        """The median in milliseconds."""
        return self.p50 / 1e6

    def speedup_over(self, other: Latency) -> float:
        """How many times faster than `other`: the median of the ratios of paired blocks."""
        ratios = [b / a for a, b in zip(self.blocks, other.blocks, strict=True)]
        return statistics.median(ratios)


def interleaved(
    calls: Mapping[str, Callable[[], Any]], *, seconds: float = 1.0, rounds: int = 7
) -> dict[str, Latency]:
    """Time several calls in one process, in turns, so that all see the same machine.

    A round gives each call a block: one call that is not counted, which brings caches and threads back, then up to 32
    that are. The order is reversed every other round.

    Args:
        calls: by name.
        seconds: to spend on each, at least.
        rounds: at least.
    """
    sizes = {name: _block_size(call) for name, call in calls.items()}
    samples: dict[str, list[int]] = {name: [] for name in calls}
    blocks: dict[str, list[float]] = {name: [] for name in calls}
    order, done, start = list(calls), 0, time.perf_counter()
    while done < rounds or time.perf_counter() - start < seconds * len(calls):
        for name in order:
            block = _block(calls[name], sizes[name])
            samples[name] += block
            blocks[name].append(statistics.median(block))
        order.reverse()
        done += 1
    return {
        name: Latency(
            statistics.median(values),
            sorted(values)[min(len(values) - 1, int(0.95 * len(values)))],
            len(values),
            tuple(blocks[name]),
        )
        for name, values in samples.items()
    }


def _block_size(call: Callable[[], Any]) -> int:
    """Calls a block, from the faster of two that are not counted."""
    return max(1, min(MOST_CALLS, BLOCK_NS // max(1, min(_block(call, 2)))))


def _block(call: Callable[[], Any], count: int) -> list[int]:
    call()
    values = []
    for _ in range(count):
        start = time.perf_counter_ns()
        call()
        values.append(time.perf_counter_ns() - start)
    return values


def seconds_of(call: Callable[[], Any], repeats: int = 5) -> float:
    """The median wall time of a call, in seconds."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def peak_bytes() -> int:
    """The most memory that this process has held (resident), in bytes.

    Linux keeps it per address space, so that a child does not inherit its parent's peak, as `ru_maxrss` would.
    """
    status = Path("/proc/self/status")
    for line in status.read_text("ascii", "replace").splitlines() if status.is_file() else ():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def in_child(
    module: str, arguments: Sequence[str], *, threads: int = 0, timeout: float = 600
) -> dict[str, Any]:
    """Run `python -m module arguments` and return the JSON object that it prints last.

    Raises:
        PennyweightError: if the child fails; its last line of output says why.
    """
    environment = dict(os.environ)
    if threads:
        environment["OMP_NUM_THREADS"] = str(threads)
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], capture_output=True, text=True, timeout=timeout, env=environment,
        check=False,
    )  # fmt: skip
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    if done.returncode != 0 or not lines:
        raise PennyweightError(
            f"a measuring process failed: {lines[-1] if lines else done.returncode}", site=module
        )
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def cpu_name() -> str:
    """What the processor calls itself."""
    info = Path("/proc/cpuinfo")
    for line in info.read_text("utf8").splitlines() if info.is_file() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def differences(wanted: Sequence[Any], found: Sequence[Any]) -> dict[str, float]:
    """How far some results are from others, arrays of the same shapes in the same order.

    Returns:
        max_abs: greatest absolute difference; sqnr_db: `10 log10(sum y^2 / sum (y - p)^2)`, 200 where equal;
        argmax_differs: fraction of rows of the last axis whose greatest entry is another.
    """
    import numpy as np

    pairs = [(e, m) for e, m in zip(wanted, found, strict=True) if e.dtype.kind == "f" and e.size]
    signal = sum(float((e.astype(np.float64) ** 2).sum()) for e, _ in pairs)
    noise = sum(float(((e.astype(np.float64) - m) ** 2).sum()) for e, m in pairs)
    rows = [(e, m) for e, m in pairs if e.ndim > 1 and e.shape[-1] > 1]
    differ = sum(int((e.argmax(-1) != m.argmax(-1)).sum()) for e, m in rows)
    total = sum(e[..., 0].size for e, _ in rows)
    return {
        "max_abs": max((float(np.abs(e - m).max()) for e, m in pairs), default=0.0),
        "sqnr_db": 200.0 if noise == 0 or signal == 0 else float(10 * np.log10(signal / noise)),
        "argmax_differs": differ / total if total else 0.0,
    }

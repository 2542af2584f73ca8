"""What this machine can do at most: multiply-adds a second, bytes a second. Measured once, kept in the user's cache."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pennyweight
from pennyweight.atomic import atomic_write
from pennyweight.errors import FormatError, KernelError
from pennyweight.measure import cpu_name
from pennyweight.runtime import library as lib
from pennyweight.runtime.engine import cores

LEVELS = ("L2", "L3", "memory")  # where a step's data may come from
# of products: their kernels
KINDS = {"int8": "peak_i8", "f32": "peak_f32", "bf16": "peak_bf16", "bits": "peak_bits"}
PASSES = 3
_MB = 1 << 20


@dataclass(frozen=True)
class Peaks:
    """Rates of one machine, by number of threads.

    Attributes:
        cpu: its name.
        version: of this package.
        macs: multiply-adds a second by kind and instruction set ("int8 amx", "bits avx2"), then by threads.
        reads: bytes a second by level of the memory, then by threads.
        caches: bytes of the caches: L2 of one core, L3 of all.
    """

    cpu: str
    version: str
    macs: dict[str, dict[int, float]]
    reads: dict[str, dict[int, float]]
    caches: dict[str, int]

    def compute(self, kind: str, isa: str, threads: int) -> float:
        """Multiply-adds a second of a kind on an instruction set; that of the strongest measured one below it.

        Raises:
            KernelError: if there is no such kind.
        """
        names = [name for name in lib.isa_names() if f"{kind} {name}" in self.macs]
        if not names:
            raise KernelError(
                f"no peak of {kind} multiply-adds was measured", hint=f"One of {', '.join(KINDS)}."
            )
        order = lib.isa_names()
        weaker = [n for n in names if isa not in order or order.index(n) <= order.index(isa)]
        return _at(self.macs[f"{kind} {(weaker or names)[-1]}"], threads)

    def bandwidth(self, size: int, threads: int) -> tuple[str, float]:
        """The smallest level that holds this many bytes, shared among threads; and its bytes a second."""
        level = "memory"
        if size <= self.caches["L2"] * threads:
            level = "L2"
        elif size <= self.caches["L3"]:
            level = "L3"
        return level, _at(self.reads[level], threads)

    def rows(self) -> list[dict[str, Any]]:
        """As table rows: one per rate, one column per number of threads."""
        rows = []
        for name, rates, unit in [
            *((f"{n} products", r, "GMAC/s") for n, r in self.macs.items()),
            *((f"reads from {n}", r, "GB/s") for n, r in self.reads.items()),
        ]:
            rows.append(
                {"peak": name, "unit": unit, **{f"x{t}": round(v / 1e9, 1) for t, v in rates.items()}}
            )
        return rows

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def _at(rates: dict[int, float], threads: int) -> float:
    """The rate at the greatest measured number of threads that is not above `threads`."""
    return rates[max((t for t in rates if t <= threads), default=min(rates))]


def measure(seconds: float = 0.3) -> Peaks:
    """Measure this machine: each rate for about so long, in passes, at 1, 2, 4, ... threads up to all cores.

    The best of many short parts counts: other work on the machine disturbs only some of them.

    Products run on registers alone, so this is what the instructions give; reads go through buffers of half an L2 a
    thread, of a part of the L3, and of more than it (256 MB at most).

    Raises:
        KernelError: without the library, or if its threads are busy.
    """
    library, names, supported = lib.load(), lib.isa_names(), lib.supported_isas()
    most, caches = cores(), cache_sizes()
    counts = sorted({*(1 << i for i in range(most.bit_length()) if 1 << i <= most), most})
    own = {(op, isa) for op, isa, _ in lib.kernels()}
    macs: dict[str, dict[int, float]] = {}
    reads: dict[str, dict[int, float]] = {level: {} for level in LEVELS}
    for _ in range(PASSES):
        for isa, (kind, op) in product(supported, KINDS.items()):
            if (op, isa) not in own:
                continue  # it is that of a weaker set
            rates = macs.setdefault(f"{kind} {isa}", {})
            for t in counts:
                rates[t] = max(rates.get(t, 0.0), macs_per_second(kind, isa, t, seconds / PASSES))
        for level, rates in reads.items():
            for t in counts:
                size = _buffer(level, caches, t)
                found = library.pw_measure_reads(names.index(supported[-1]), size, t, seconds / PASSES)
                rates[t] = max(rates.get(t, 0.0), _checked(found))
    return Peaks(cpu_name(), pennyweight.__version__, macs, reads, caches)


def macs_per_second(kind: str, isa: str, threads: int, seconds: float) -> float:
    """Products a second of one kind on registers alone, with the instructions of one instruction set.

    Raises:
        KernelError: without the library, if its threads are busy, or if this machine lacks the set.
    """
    number, names = list(KINDS).index(kind), lib.isa_names()
    return _checked(lib.load().pw_measure_macs(names.index(isa), number, threads, seconds))


def _checked(rate: float) -> float:
    if rate < 0:
        raise KernelError(f"the machine cannot be measured: {lib.last_error(lib.load())}")
    return rate


def _buffer(level: str, caches: dict[str, int], threads: int) -> int:
    """Bytes of each thread's buffer."""
    if level == "L2":
        return caches["L2"] // 2
    if level == "L3":
        return max(2 * caches["L2"], min(caches["L3"] // (2 * threads), 16 * _MB))
    return max(32 * _MB, min(2 * caches["L3"], 256 * _MB)) // threads


def cache_sizes() -> dict[str, int]:
    """Bytes of one core's L2 and of the L3, as the system says; 1 MB and 16 MB where it does not."""
    found = {"L2": _MB, "L3": 16 * _MB}
    folder = Path("/sys/devices/system/cpu/cpu0/cache")
    for index in sorted(folder.glob("index*")) if folder.is_dir() else ():
        try:
            level = f"L{(index / 'level').read_text('ascii').strip()}"
            size = (index / "size").read_text("ascii").strip()
        except OSError:  # a virtual machine may hide them
            continue
        if level in found and size.endswith("K") and size[:-1].isdigit():
            found[level] = int(size[:-1]) << 10
    return found


def cache_folder() -> Path:
    """The user's cache folder of this package: `PENNYWEIGHT_CACHE`, else the system's usual place."""
    if named := os.environ.get("PENNYWEIGHT_CACHE"):
        return Path(named)
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "pennyweight"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pennyweight"


def cache_file() -> Path:
    """Where the peaks of this machine are kept: one file per processor and version of this package."""
    key = hashlib.sha256(f"{cpu_name()}|{cores()}|{pennyweight.__version__}".encode()).hexdigest()[:12]
    return cache_folder() / f"peaks-{key}.json"


def store(peaks: Peaks) -> Path:
    """Write them to the cache, atomically.

    Raises:
        OSError: if the folder cannot be made or written.
    """
    path = cache_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(json.dumps(peaks.to_dict(), indent=1).encode())
    return path


def stored() -> Peaks | None:
    """The peaks of this machine, if they were measured with this version.

    Raises:
        FormatError: if the file in the cache is none of ours; measure again, which replaces it.
    """
    path = cache_file()
    try:
        text = path.read_text("utf8")
    except OSError:
        return None
    try:
        data = json.loads(text)
        macs, reads = ({k: _rates(v) for k, v in data[part].items()} for part in ("macs", "reads"))
        caches = {level: int(data["caches"][level]) for level in ("L2", "L3")}
        if {name.split(" ")[0] for name in macs} != set(KINDS) or set(reads) != set(LEVELS):
            raise ValueError("rates are missing")
        return Peaks(str(data["cpu"]), str(data["version"]), macs, reads, caches)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FormatError(
            f"the stored peaks cannot be read: {type(error).__name__}: {error}",
            site=str(path),
            hint="Measure again: pennyweight doctor --calibrate.",
        ) from error


def _rates(values: dict[str, Any]) -> dict[int, float]:
    rates = {int(threads): float(rate) for threads, rate in values.items()}
    if not rates or not all(t > 0 and 0 < r < float("inf") for t, r in rates.items()):
        raise ValueError("rates must be positive")
    return rates

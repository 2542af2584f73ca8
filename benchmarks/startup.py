"""How long a fresh process takes to its first result, torch-free.

usage: python benchmarks/startup.py FILE.dwt [--runs 15] [--json]

Each run is a new interpreter that imports pennyweight.runtime, loads the file and runs the first inference at the
example's sizes, batch 1. A bare `import numpy` is timed in turns with it: numpy is given, the rest is ours. Byte code
is written to a temporary folder first, as an installed package has it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

OURS = """
import time; t = [time.perf_counter()]
import numpy as np; t.append(time.perf_counter())
import pennyweight.runtime as runtime; t.append(time.perf_counter())
session = runtime.load({path!r}, threads=1); t.append(time.perf_counter())
free = session.program.symbols
inputs = {{p.name: np.zeros([1 if d == p.shape[0] and d in free else free.get(d, d) for d in p.shape], p.dtype)
          for p in session.inputs}}
session.run(inputs); t.append(time.perf_counter())
import sys
assert "torch" not in sys.modules
print(session.backend, *(round(1e3 * (b - a), 3) for a, b in zip(t, t[1:])))
"""
BARE = "import numpy; print('numpy')"


def once(code: str, environment: dict[str, str]) -> tuple[float, list[str]]:
    """Wall milliseconds of a fresh interpreter, and what it printed."""
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    return 1e3 * (time.perf_counter() - start), done.stdout.split()


def measure(path: Path, runs: int) -> dict[str, object]:
    """Medians and best over runs, in milliseconds."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "PYTHONPYCACHEPREFIX": cache}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        code = OURS.format(path=str(path))
        once(code, environment)  # writes the byte code
        total, bare, parts, backend = [], [], [], ""
        for _ in range(runs):
            bare.append(once(BARE, environment)[0])
            wall, (backend, *steps) = once(code, environment)
            total.append(wall)
            parts.append([float(s) for s in steps])
    medians = [statistics.median(column) for column in zip(*parts, strict=True)]
    best = [min(column) for column in zip(*parts, strict=True)]
    names = ("import_numpy_ms", "import_ms", "load_ms", "first_run_ms")
    return {
        "file": path.name,
        "bytes": path.stat().st_size,
        "backend": backend,
        "runs": runs,
        "total_ms": statistics.median(total),
        "bare_numpy_ms": statistics.median(bare),
        "ours_ms": statistics.median(total) - statistics.median(bare),
        "best_total_ms": min(total),
        "best_bare_numpy_ms": min(bare),
        **dict(zip(names, medians, strict=True)),
        **{f"best_{name}": value for name, value in zip(names, best, strict=True)},
    }


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    result = measure(args.file, args.runs)
    if args.json:
        print(json.dumps(result, indent=1))
    else:
        for key, value in result.items():
            print(f"{key:<20} {value:.2f}" if isinstance(value, float) else f"{key:<20} {value}")


if __name__ == "__main__":
    main()

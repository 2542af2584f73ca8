"""A fresh process to its first result: ours without torch, and the peers, in turns.

usage: python benchmarks/startup.py FILE.dwt [--runs 15] [--threads 2] [--json]
       python benchmarks/startup.py FOLDER --network mobilenet_v2 --peers PYTHON [--python PYTHON]

Each run is a new interpreter that imports its library, loads one file and runs the first inference, batch 1. With
--peers, FOLDER is the one that `speed.py --work FOLDER` left: the same network, quantized by each contender's tools.
--python is an environment with pennyweight installed as users install it (default: this one, where it may be installed
for development). A bare `import numpy` takes its turn too: numpy is given, the rest is ours. Byte code is written
first, as an installed package has it.

Per contender: milliseconds by the clock and of processor time, of the whole process and of loading and first run
(imports aside), peak resident memory, and bytes installed (of its distribution; of ours, the library and the modules in
use; numpy aside). Ratios are medians over turns. Processor time says most on a machine that others use too.
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

BEGIN = """
import sys, time
path, threads = sys.argv[1], int(sys.argv[2])
def now(): return time.perf_counter(), time.process_time()
at = [now()]
import numpy as np
at.append(now())
"""
END = """
import json
steps = [[1e3 * (b[i] - a[i]) for a, b in zip(at, at[1:])] for i in (0, 1)]
with open("/proc/self/status") as status:
    peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
print(json.dumps({"wall": steps[0], "cpu": steps[1], "bytes": size, "peak": peak}))
"""
DISTRIBUTION = """
from importlib.metadata import distribution
files = [p.locate() for p in distribution(name).files if p.suffix != ".pyc"]
size = sum(p.stat().st_size for p in files if p.is_file())
"""
OURS = """
import pennyweight.runtime as runtime
at.append(now())
session = runtime.load(path, backend="native", threads=threads)
at.append(now())
free = session.program.symbols
inputs = {p.name: np.zeros([1 if d == p.shape[0] and d in free else free.get(d, d) for d in p.shape], p.dtype)
          for p in session.inputs}
session.run(inputs)
at.append(now())
assert "torch" not in sys.modules
from pathlib import Path
from pennyweight.runtime import library
files = [m.__file__ for n, m in sys.modules.items() if n.split(".")[0] == "pennyweight"] + [library.place()]
size = sum(Path(f).stat().st_size for f in files if f)
"""
ORT = """
import onnxruntime
at.append(now())
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = threads
session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
at.append(now())
kinds = {"tensor(float)": np.float32, "tensor(int64)": np.int64}
session.run(None, {i.name: np.zeros([d if isinstance(d, int) else 1 for d in i.shape], kinds[i.type])
                   for i in session.get_inputs()})
at.append(now())
name = "onnxruntime"
"""
OPENVINO = """
import openvino
at.append(now())
config = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
request = openvino.Core().compile_model(path, "CPU", config).create_infer_request()
at.append(now())
request.infer([np.zeros(list(p.shape), p.element_type.to_dtype()) for p in request.model_inputs])
at.append(now())
name = "openvino"
"""
BARE = "size = 0\n"
CONTENDERS = {
    "pennyweight": ("{}.int8.dwt", BEGIN + OURS + END),
    "onnxruntime": ("{}.static.onnx", BEGIN + ORT + DISTRIBUTION + END),
    "openvino": ("{}.openvino.int8.xml", BEGIN + OPENVINO + DISTRIBUTION + END),
    "numpy alone": ("{}.int8.dwt", BEGIN + BARE + END),
}


def once(python: str, code: str, path: Path, threads: int, environment: dict[str, str]) -> dict[str, float]:
    """One fresh process: what the clock, the operating system and the process itself say of it."""
    start = time.perf_counter()
    child = subprocess.Popen(
        [python, "-c", code, str(path), str(threads)], env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert child.stdout is not None
    assert child.stderr is not None
    said, complaint = child.stdout.read(), child.stderr.read()
    _, status, usage = os.wait4(child.pid, 0)
    wall = time.perf_counter() - start
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{path.name}: {complaint[-2000:]}")
    told = json.loads(said.splitlines()[-1])
    figures = {"total_ms": 1e3 * wall, "total_cpu_ms": 1e3 * (usage.ru_utime + usage.ru_stime)}
    for kind, suffix in (("wall", "_ms"), ("cpu", "_cpu_ms")):
        for name, value in zip(("numpy", "import", "load", "first"), told[kind], strict=False):
            figures[name + suffix] = value
        figures["start" + suffix] = sum(told[kind][2:])
    return {**figures, "memory_mb": told["peak"] / 1e3, "installed_mb": told["bytes"] / 1e6}


def measure(
    files: dict[str, Path], pythons: dict[str, str], runs: int, threads: int
) -> dict[str, dict[str, float]]:
    """Medians per contender, and of the ratios to ours turn by turn (`ratio_...`, above 1: we are ahead)."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in files}
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "PYTHONPYCACHEPREFIX": cache}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        for turn in range(runs + 1):
            for name, path in files.items():
                row = once(pythons[name], CONTENDERS[name][1], path, threads, environment)
                if turn:  # the first writes byte code and warms the caches of files
                    found[name].append(row)
    results = {}
    for name, rows in found.items():
        results[name] = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
        if name == "numpy alone":
            continue
        for key in rows[0]:
            pairs = zip(rows, found["pennyweight"], strict=True)
            results[name][f"ratio_{key}"] = statistics.median(r[key] / max(o[key], 1e-9) for r, o in pairs)
    return results


SHOWN = (
    "total_ms", "total_cpu_ms", "import_ms", "load_ms", "first_ms", "start_ms", "start_cpu_ms", "memory_mb",
    "installed_mb",
)  # fmt: skip


def table(results: dict[str, dict[str, float]]) -> str:
    """Figures, one contender a row; behind each of a peer's, its ratio to ours."""
    lines = [" " * 12 + "".join(f"{key:>22}" for key in SHOWN)]
    for name, row in results.items():
        cells = []
        for key in SHOWN:
            ratio = row.get(f"ratio_{key}")
            note = f" ({ratio:.2f}x)" if ratio and name != "pennyweight" else ""
            cells.append(f"{f'{row[key]:.1f}{note}' if key in row else '-':>22}")
        lines.append(f"{name:<12}" + "".join(cells))
    return "\n".join(lines)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, help="a .dwt file, or with --peers a folder of speed.py --work")
    parser.add_argument("--network", default="mobilenet_v2")
    parser.add_argument("--peers", help="Python of an environment with the peers")
    parser.add_argument("--python", default=sys.executable, help="Python of an environment with pennyweight")
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.peers:
        files = {name: args.file / file.format(args.network) for name, (file, _) in CONTENDERS.items()}
    else:
        files = dict.fromkeys(("pennyweight", "numpy alone"), args.file)
    pythons = {n: args.peers if n in ("onnxruntime", "openvino") else args.python for n in files}
    results = measure(files, pythons, args.runs, args.threads)
    print(json.dumps(results, indent=1) if args.json else table(results))


if __name__ == "__main__":
    main()

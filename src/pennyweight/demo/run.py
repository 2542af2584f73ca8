"""The proof in one run: quantize the embedded network, then measure both on real images, on this machine."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

import pennyweight as pw
from pennyweight.atomic import atomic_write
from pennyweight.demo.data import images, normalized, weights_path
from pennyweight.demo.network import FashionNet
from pennyweight.errors import PennyweightError
from pennyweight.measure import cpu_name, interleaved, seconds_of
from pennyweight.progress import track
from pennyweight.report.collect import collect

ALLOWED_DROP = 0.2  # points of top-1 accuracy
BATCH = 100
PICTURED = 128  # test images whose activations the report draws
REFERENCE_LIMIT = 500  # images that the slow interpreter is given unless more are asked for


def float_network() -> FashionNet:
    """The trained network, in eval mode."""
    from safetensors.torch import load_file

    network = FashionNet()
    network.load_state_dict(load_file(weights_path()), strict=False)  # only batch counters are missing
    return network.eval()


def run(
    out: Path,
    *,
    limit: int = 0,
    threads: int = 2,
    backend: str = "auto",
    recipe: str = "int8",
    seconds: float = 2.0,
) -> dict[str, Any]:
    """Quantize, evaluate, time, and write `demo.json`, `demo.txt`, `report.html` and the model file.

    Args:
        out: folder for the files; made if it is not there.
        limit: how many of the 10,000 test images; 0 for all (for 500, on the reference backend).
        threads: of both PyTorch and the engine.
        backend: see `runtime.Session`.
        recipe: how to quantize.
        seconds: to time each side for.

    Returns:
        Plain JSON values; "passed" says whether the accuracy dropped by no more than 0.2 points (or one image).
    """
    out.mkdir(parents=True, exist_ok=True)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return _run(out, limit, threads, backend, recipe, seconds)
    finally:
        torch.set_num_threads(before)


def _run(out: Path, limit: int, threads: int, backend: str, recipe: str, seconds: float) -> dict[str, Any]:
    network, data = float_network(), images()
    batches = torch.from_numpy(normalized(data.calibration)).split(64)
    quantized = pw.quantize(network, batches, recipe=recipe)
    path = pw.save(quantized, out / "fashion.dwt")
    session = pw.load(path, backend=backend, threads=threads)
    if session.backend == "reference":
        limit = limit or REFERENCE_LIMIT
    count = min(limit or len(data.test), len(data.test))
    x, y = normalized(data.test[:count]), data.labels[:count]

    def eager(batch: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        with torch.inference_mode():
            result: npt.NDArray[np.float32] = network(torch.from_numpy(batch)).numpy()
        return result

    expected = _logits(eager, x, "float32 on the test images")
    got = _logits(session.run, x, f"{recipe} on the test images")
    one = np.ascontiguousarray(x[:1])
    times = interleaved({"float": lambda: eager(one), "ours": lambda: session.run(one)}, seconds=seconds)
    float_accuracy, accuracy = _accuracy(expected, y), _accuracy(got, y)
    allowed = max(ALLOWED_DROP, 100 / count)  # on few images a single one may weigh more than the promise
    log = pw.journal(quantized)
    result = {
        "data": f"Fashion-MNIST, first {count} of 10,000 test images; calibrated on 512 training images",
        "machine": {"cpu": cpu_name(), "threads": threads, "torch": str(torch.__version__)},
        "backend": session.backend,
        "backend_note": session.note,
        "recipe": recipe,
        "float": {
            "accuracy": float_accuracy,
            "latency_ms": times["float"].ms,
            "latency_p95_ms": times["float"].p95 / 1e6,
            "bytes": weights_path().stat().st_size,
            "load_ms": 1e3 * seconds_of(float_network),
        },
        "quantized": {
            "accuracy": accuracy,
            "latency_ms": times["ours"].ms,
            "latency_p95_ms": times["ours"].p95 / 1e6,
            "bytes": path.stat().st_size,
            "load_ms": 1e3 * seconds_of(lambda: pw.load(path, backend=backend, threads=threads)),
        },
        "speedup": times["ours"].speedup_over(times["float"]),
        "agreement": 100 * float((expected.argmax(1) == got.argmax(1)).mean()),
        "drop": float_accuracy - accuracy,
        "allowed_drop": allowed,
        "passed": float_accuracy - accuracy <= allowed + 1e-9,
        "sites": len(log.of("site")),
        "kept": log.rows("kept"),
        "difference": session.program.meta["difference"],
        "steps": session.profile(one),
        "file": str(path),
    }
    result["report"] = _page(
        quantized, network, torch.from_numpy(normalized(data.test[:PICTURED])), result, out
    )
    with atomic_write(out / "demo.json") as file:
        file.write(json.dumps(result, indent=1).encode())
    with atomic_write(out / "demo.txt") as file:
        file.write(report(result).encode())
    return result


def _page(
    quantized: torch.nn.Module, network: FashionNet, x: torch.Tensor, result: dict[str, Any], out: Path
) -> str:
    """The HTML report with the figures of this run; "" where what draws it is not installed."""
    collect(
        network, quantized, x.split(64), threads=result["machine"]["threads"], seconds=0.3, progress=False
    )
    log = pw.journal(quantized)
    for kind in ("accuracy", "latency", "size"):
        log.events[:] = [event for event in log.events if event.kind != kind]
    a, b = result["float"], result["quantized"]
    log.add("accuracy", "", float=a["accuracy"], quantized=b["accuracy"], metric="top-1, %")
    log.add("latency", "", float_ms=a["latency_ms"], ms=b["latency_ms"], speedup=result["speedup"])
    log.add("size", before=a["bytes"], after=b["bytes"])
    try:
        return str(pw.report(quantized, out / "report.html", title="Pennyweight demo: Fashion-MNIST"))
    except PennyweightError as error:
        log.add("note", text=error.what)
        return ""


def _logits(call: Callable[[Any], Any], x: npt.NDArray[np.float32], what: str) -> npt.NDArray[np.float32]:
    starts = range(0, len(x), BATCH)
    return np.concatenate([call(x[i : i + BATCH]) for i in track(starts, what)])


def _accuracy(logits: npt.NDArray[np.float32], labels: npt.NDArray[np.uint8]) -> float:
    """Top-1 accuracy in percent."""
    return 100 * float((logits.argmax(1) == labels).mean())


def rows(result: dict[str, Any]) -> list[dict[str, str]]:
    """The proof as table rows."""
    a, b = result["float"], result["quantized"]
    return [
        {"": "top-1 accuracy", "float32, PyTorch": f"{a['accuracy']:.2f} %",
         "int8, pennyweight": f"{b['accuracy']:.2f} %", "change": f"{-result['drop']:+.2f} points"},
        {"": "latency, batch 1", "float32, PyTorch": f"{a['latency_ms']:.3f} ms",
         "int8, pennyweight": f"{b['latency_ms']:.3f} ms", "change": f"{result['speedup']:.2f} x as fast"},
        {"": "file", "float32, PyTorch": f"{a['bytes']:,} B", "int8, pennyweight": f"{b['bytes']:,} B",
         "change": f"{a['bytes'] / b['bytes']:.2f} x smaller"},
        {"": "load", "float32, PyTorch": f"{a['load_ms']:.1f} ms", "int8, pennyweight": f"{b['load_ms']:.1f} ms",
         "change": f"{a['load_ms'] / b['load_ms']:.2f} x as fast"},
    ]  # fmt: skip


def step_rows(result: dict[str, Any]) -> list[dict[str, str]]:
    """Which kernel ran for each layer."""
    total = sum(step.get("ns", 0) for step in result["steps"]) or 1
    return [
        {
            "layer": str(step.get("site", "")),
            "op": str(step.get("op", "")),
            "kernel": str(step.get("kernel", "")),
            "us": f"{step.get('ns', 0) / 1e3:.1f}",
            "share": f"{100 * step.get('ns', 0) / total:.1f} %",
        }
        for step in result["steps"]
    ]


def report(result: dict[str, Any]) -> str:
    """The proof as plain text."""
    machine = result["machine"]
    lines = [
        "Pennyweight demo",
        result["data"],
        f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}; backend {result['backend']}",
        "",
    ]
    lines += ["  ".join(f"{value:>18}" for value in row.values()) for row in rows(result)]
    lines += [
        "",
        f"same answer on {result['agreement']:.2f} % of the images",
        f"{result['sites']} sites quantized, {len(result['kept'])} kept in float",
        *(f"  kept {row['site']}: {row['reason']}" for row in result["kept"]),
        f"program against the eager integer model: largest difference {result['difference']['max_abs']:g}",
        "passed" if result["passed"] else f"FAILED: accuracy dropped by {result['drop']:.2f} points",
        "",
    ]
    lines += ["  ".join(row.values()) for row in step_rows(result)]
    return "\n".join(lines) + "\n"

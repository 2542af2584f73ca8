"""`pennyweight bench`: a quantized file against float PyTorch, in turns, on this machine."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from pennyweight.cli.options import Backend, Json, Limit, RecipeName, find_recipe
from pennyweight.cli.output import emit, note


def command(
    target: Annotated[
        str, typer.Argument(help="A .dwt file, or a MODEL to be quantized first (see quantize).")
    ],
    model: Annotated[str, typer.Option(help="The float MODEL to compare a file with.")] = "",
    calib: Annotated[
        str, typer.Option(help="Calibration inputs for a MODEL; its own example otherwise.")
    ] = "",
    recipe: RecipeName = "int8",
    batch: Annotated[str, typer.Option(help="Batch sizes, such as 1,8.")] = "1",
    threads: Annotated[str, typer.Option(help="Thread counts, such as 1,2; 0 for one per core.")] = "0",
    seconds: Annotated[
        float, typer.Option(min=0.05, help="To spend on each side of each line, at least.")
    ] = 1.0,
    limit: Limit = 128,
    layers: Annotated[
        bool, typer.Option("--layers", help="Show the kernel, time, rate and verdict of each layer.")
    ] = False,
    memory: Annotated[bool, typer.Option(help="Measure peak memory in child processes.")] = True,
    backend: Backend = "auto",
    json: Json = False,
) -> None:
    """Measure a quantized file against float PyTorch.

    Latency in turns in one process, throughput, size, load time; peak memory in processes of their own.
    Without --calib a MODEL is calibrated on its own example: fit for timing, not for accuracy.
    """
    batches, counts = whole(batch, "--batch", 1), whole(threads, "--threads", 0)
    with tempfile.TemporaryDirectory() as folder:
        file, reference = Path(target), model
        if file.suffix != ".dwt":
            file, reference = Path(folder) / "model.dwt", target
            _quantize(target, calib, recipe, limit, file)
        result = measure(file, reference, batches, counts, seconds, backend, memory=memory, layers=layers)
    emit(result, tables(result), json)


def whole(text: str, what: str, least: int) -> list[int]:
    """A comma-separated list of whole numbers.

    Raises:
        typer.BadParameter: if it is none, or one is too small.
    """
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < least:
        raise typer.BadParameter(f"{what} {text!r} is no list of whole numbers from {least}")
    return found


def _quantize(target: str, calib: str, recipe: str, limit: int, file: Path) -> None:
    import pennyweight as pw
    from pennyweight.cli.data import ImageOptions, load_data
    from pennyweight.cli.models import load_model
    from pennyweight.errors import InputError

    loaded = load_model(target)
    if calib:
        source: Any = load_data(calib, 32, limit, ImageOptions())
    elif loaded.example is not None:
        note("calibrating on the model's own example: fit for timing, not for accuracy")
        source = [loaded.example]
    else:
        raise InputError(
            "the model brings no example",
            site=target,
            hint="Let it return (module, example), or give --calib.",
        )
    pw.save(pw.quantize(loaded.model, source, find_recipe(recipe), example=loaded.example), file)


def measure(
    file: Path, reference: str, batches: list[int], counts: list[int], seconds: float, backend: str, *,
    memory: bool, layers: bool,
) -> dict[str, Any]:  # fmt: skip
    """All measurements as plain values."""
    from pennyweight.cli.memory import example_arrays
    from pennyweight.measure import cpu_name, in_child, seconds_of
    from pennyweight.runtime import load

    floats = _Float(reference) if reference else None
    rows, profiles = [], []
    for count in counts:
        session = load(file, backend=backend, threads=count)
        for size in batches:
            inputs = floats.arrays(session, size) if floats else example_arrays(session, size)
            rows.append(_row(session, inputs, floats, size, count, seconds))
            if layers:
                profiles.append((size, _profile(session, inputs, floats, size, seconds)))
    result: dict[str, Any] = {
        "file": str(file),
        "bytes": file.stat().st_size,
        "load_ms": 1e3 * seconds_of(lambda: load(file, backend=backend)),
        "backend": session.backend,
        "note": session.note,
        "cpu": cpu_name(),
        "rows": rows,
        "layers": [{"batch": size, **found.to_dict(), "table": found.rows()} for size, found in profiles],
        "notes": {f"batch {size}, {found.threads} threads": found.summary() for size, found in profiles},
    }
    if floats:
        result["float_bytes"] = floats.nbytes
    if memory:
        ours = in_child(
            "pennyweight.cli.memory", ["file", str(file), str(batches[0]), str(counts[0]), backend]
        )
        result["peak_bytes"] = ours["peak"]
        if floats:
            theirs = in_child("pennyweight.cli.memory", ["model", reference, str(batches[0]), str(counts[0])])
            result["float_peak_bytes"] = theirs["peak"]
    return result


def _profile(session: Any, inputs: Any, floats: _Float | None, size: int, seconds: float) -> Any:
    """The execution report at one batch size, against the float model if there is one."""
    from pennyweight.runtime.peaks import stored
    from pennyweight.runtime.profile import profile_session

    if floats is None:
        return profile_session(session, inputs, peaks=stored(), seconds=seconds)
    from pennyweight.profiling import profile

    return profile(session, floats.batch(size), against=floats.loaded.model, seconds=seconds)


class _Float:
    """The float model under eager PyTorch."""

    def __init__(self, reference: str) -> None:
        from pennyweight.cli.models import load_model
        from pennyweight.errors import InputError
        from pennyweight.pipeline import model_bytes

        self.loaded = load_model(reference)
        if self.loaded.example is None:
            raise InputError(
                "the model brings no example to time it with",
                site=reference,
                hint="Let it return (module, example).",
            )
        self.nbytes = model_bytes(self.loaded.model)

    def batch(self, size: int) -> Any:
        """The example at a batch size."""
        from pennyweight.cli.memory import resized

        return resized(self.loaded.example, size)

    def arrays(self, session: Any, size: int) -> dict[str, Any]:
        """The same as arrays by the program's input names."""
        from torch import Tensor
        from torch.utils._pytree import tree_leaves

        leaves = [t.numpy() for t in tree_leaves(self.batch(size)) if isinstance(t, Tensor)]
        return dict(zip([port.name for port in session.inputs], leaves, strict=True))

    def call(self, size: int) -> Any:
        """A function that runs it once."""
        import torch

        from pennyweight.graph.record import call

        inputs, model = self.batch(size), self.loaded.model

        def once() -> None:
            with torch.inference_mode():
                call(model, inputs)

        return once


def _row(
    session: Any, inputs: Any, floats: _Float | None, size: int, count: int, seconds: float
) -> dict[str, Any]:
    from pennyweight.measure import interleaved

    calls: dict[str, Any] = {"ours": lambda: session.run(inputs)}
    before = 0
    if floats:
        import torch

        before = torch.get_num_threads()
        torch.set_num_threads(count or os.cpu_count() or 1)
        calls["float"] = floats.call(size)
    times = interleaved(calls, seconds=seconds)
    ours = times["ours"]
    row: dict[str, Any] = {"batch": size, "threads": count or os.cpu_count() or 1}
    if floats:
        import torch

        torch.set_num_threads(before)
        row |= {"float_p50_ms": times["float"].ms, "float_p95_ms": times["float"].p95 / 1e6}
    row |= {
        "p50_ms": ours.ms,
        "p95_ms": ours.p95 / 1e6,
        "per_second": size / (ours.p50 / 1e9),
        "calls": ours.calls,
    }
    if floats:
        row["speedup"] = ours.speedup_over(times["float"])
    return row


def tables(result: dict[str, Any]) -> dict[str, Any]:
    """The measurements as tables."""
    facts = [
        {"": "cpu", "value": result["cpu"]},
        {"": "backend", "value": f"{result['backend']} ({result['note']})"},
    ]
    sizes = f"{result['bytes']:,} bytes"
    if "float_bytes" in result:
        sizes = (
            f"{result['float_bytes']:,} -> {sizes} ({result['float_bytes'] / result['bytes']:.2f} x smaller)"
        )
    facts += [{"": "size", "value": sizes}, {"": "load", "value": f"{result['load_ms']:.2f} ms"}]
    if "peak_bytes" in result:
        peak = f"{result['peak_bytes'] / 1e6:.0f} MB"
        if "float_peak_bytes" in result:
            peak = f"{result['float_peak_bytes'] / 1e6:.0f} -> {peak}"
        facts.append({"": "peak memory", "value": peak})
    layers = {
        f"layers, {what}: {text}": found["table"]
        for (what, text), found in zip(result["notes"].items(), result["layers"], strict=True)
    }
    return {"": facts, "latency, in turns": result["rows"], **layers}

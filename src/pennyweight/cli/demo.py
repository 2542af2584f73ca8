"""`pennyweight demo`: the proof, offline, on the embedded network and images."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from pennyweight.cli.options import Backend, Json, RecipeName
from pennyweight.cli.output import emit, note


def command(
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for demo.json, demo.txt and the model.")
    ] = Path("out"),
    limit: Annotated[int, typer.Option(min=0, help="Test images; 0 for all 10,000.")] = 0,
    threads: Annotated[int, typer.Option(min=1, help="Threads of both sides.")] = min(2, os.cpu_count() or 1),
    recipe: RecipeName = "int8",
    seconds: Annotated[float, typer.Option(min=0.05, help="To time each side for, at least.")] = 2.0,
    backend: Backend = "auto",
    json: Json = False,
) -> None:
    """Prove it here: quantize a real network, compare with PyTorch.

    The embedded Fashion-MNIST network, quantized to int8: accuracy, latency, size and load time of both.
    Exits with 1 if the accuracy drops by more than 0.2 points.
    """
    note("importing PyTorch, quantizing, lowering")
    from pennyweight.demo.run import REFERENCE_LIMIT, rows, run, step_rows

    result = run(out, limit=limit, threads=threads, backend=backend, recipe=recipe, seconds=seconds)
    machine = result["machine"]
    title = f"{result['data']}\n{machine['cpu']}, {machine['threads']} threads, backend {result['backend']}"
    emit(result, {title: rows(result), "kernels": step_rows(result), "kept in float": result["kept"]}, json)
    if result["backend"] == "reference":
        note(
            f"{result['backend_note']}: the slow reference ran on {limit or REFERENCE_LIMIT} images; see --limit"
        )
    verdict = "passed" if result["passed"] else "FAILED"
    note(
        f"{verdict}: accuracy changed by {-result['drop']:+.2f} points ({result['allowed_drop']:.2g} allowed); "
        f"same answer on {result['agreement']:.2f} % of the images. "
        f"Wrote {out / 'demo.json'}, {out / 'demo.txt'}"
        + (
            f" and the report, {result['report']}."
            if result["report"]
            else "; no report: pip install pennyweight[report]."
        )
    )
    if not result["passed"]:
        raise typer.Exit(1)

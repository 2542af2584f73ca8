"""`pennyweight tune`: a goal instead of a recipe."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from pennyweight.cli.options import Batch, Json, Limit, Threads, numbers
from pennyweight.cli.output import emit, note


def command(
    model: Annotated[str, typer.Argument(help="The float MODEL (see quantize).")],
    evaluate: Annotated[
        str, typer.Option(help="package.module:function from a model to its quality, greater is better.")
    ],
    calib: Annotated[
        str, typer.Option(help="DATA to calibrate with; the model's own example otherwise.")
    ] = "",
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write the chosen model to.")] = Path(),
    page: Annotated[Path, typer.Option("--report", help="HTML report to write.")] = Path(),
    max_drop: Annotated[float, typer.Option(min=0, help="Accepted loss, in the units of --evaluate.")] = 0.5,
    minimize: Annotated[str, typer.Option(help="latency, size or bops.")] = "latency",
    limit_size: Annotated[float, typer.Option(min=0, help="Bytes of parameters at most; 0 for any.")] = 0.0,
    limit_latency: Annotated[float, typer.Option(min=0, help="Milliseconds at most; 0 for any.")] = 0.0,
    formats: Annotated[str, typer.Option(help="That layers may have.")] = "float32,bf16,int8,int4",
    budget: Annotated[str, typer.Option(help="Time: 10 min, 90 s.")] = "10 min",
    train: Annotated[
        str, typer.Option(help="package.module:function that makes (input, target) pairs.")
    ] = "",
    cache: Annotated[Path, typer.Option(help="JSON file that keeps sensitivities between runs.")] = Path(),
    batch: Batch = 32,
    limit: Limit = 512,
    size: Annotated[int, typer.Option(min=0, help="Images: side of the square cut from the middle.")] = 0,
    mean: Annotated[str, typer.Option(help="Images: mean of each channel, on 0..1.")] = "",
    std: Annotated[str, typer.Option(help="Images: standard deviation of each channel, on 0..1.")] = "",
    threads: Threads = 0,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    json: Json = False,
) -> None:
    """Find the cheapest model that loses no more than --max-drop.

    Exits with 1 if the goal is not met; the best found is written all the same.
    """
    import pennyweight as pw
    from pennyweight.cli.data import ImageOptions, load_data
    from pennyweight.cli.models import load_model
    from pennyweight.errors import EmptyCalibration

    loaded = load_model(model)
    options = ImageOptions(size, 0, numbers(mean, "--mean"), numbers(std, "--std"))
    if not calib and loaded.example is None:
        raise EmptyCalibration("there is no --calib, and the model brings no example", site=model)
    batches = list(load_data(calib, batch, limit, options)()) if calib else [loaded.example]
    goal = pw.Goal(max_drop, minimize, limit_size or None, limit_latency or None)  # type: ignore[arg-type]
    found = pw.tune(
        loaded.model, batches, evaluate=_function(evaluate), goal=goal, formats=tuple(formats.split(",")),
        budget=budget, train=_function(train) if train else None, cache=None if cache == Path() else cache,
        threads=threads, seed=seed, progress=not json,
    )  # fmt: skip
    if page != Path():
        pw.report(found.model, page, against=loaded.model, batches=batches[:4])
    if out != Path():
        pw.save(found.model, out, loaded.example)
    result = {"model": model, **found.evidence()}
    verdict = "met" if found.met else "NOT MET"
    emit(result, {f"goal {verdict} after {found.seconds:.0f} s": found.rows()}, json)
    note(
        f"{verdict}: {found.chosen.name}, drop {found.chosen.drop:+.4g}, {found.chosen.speedup:.2f} x float's speed"
    )
    if not found.met:
        raise typer.Exit(1)


def _function(reference: str) -> Callable[..., Any]:
    """What a reference names, uncalled.

    Raises:
        InputError: if it names no function.
    """
    from pennyweight.cli.models import find_reference
    from pennyweight.errors import InputError

    found = find_reference(reference)
    if not callable(found):
        raise InputError(f"it is a {type(found).__name__}, not a function", site=reference)
    function: Callable[..., Any] = found
    return function

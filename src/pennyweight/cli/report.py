"""`pennyweight report`: the page of a saved file, or of a model that is quantized and measured for it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pennyweight.cli.options import Json
from pennyweight.cli.output import emit, note


def command(
    file: Annotated[Path, typer.Argument(help="A .dwt file.")],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Page to write; FILE with .html otherwise.")
    ] = Path(),
    title: Annotated[str, typer.Option(help="Heading of the page.")] = "",
    json: Json = False,
) -> None:
    """Make the HTML report of FILE again, from the journal in it.

    One page, no network, light and dark. `pennyweight quantize --report` and `tune` measure what it shows.
    """
    from pennyweight.report import report

    target = out if out != Path() else file.with_suffix(".html")
    written = report(file, target, title=title)
    result: dict[str, Any] = {"file": str(file), "page": str(written), "bytes": written.stat().st_size}
    emit(result, {"": [{"": key, "value": value} for key, value in result.items()]}, json)
    note(f"Open {written} in a browser.")

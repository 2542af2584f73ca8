"""Progress bars with the time left, on a terminal, for whatever takes over a second."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import TypeVar

T = TypeVar("T")


def track(items: Iterable[T], what: str, *, total: int | None = None, show: bool = True) -> Iterator[T]:
    """Yield the items; after the first second, show a bar with the time left, or a counter if there is no length.

    Args:
        items: anything iterable.
        what: label of the bar.
        total: number of items, if `items` does not say.
        show: whether to show a bar at all; never where standard error is no terminal.
    """
    if total is None:
        with suppress(TypeError):
            total = len(items)  # type: ignore[arg-type]
    if not show or not sys.stderr.isatty():
        yield from items
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    task = bar.add_task(what, total=total)
    start, shown = time.monotonic(), False
    try:
        for item in items:
            yield item
            bar.advance(task)
            if not shown and time.monotonic() - start > 1:
                bar.start()
                shown = True
    finally:
        if shown:
            bar.stop()

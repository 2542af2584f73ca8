"""Tables for people, JSON for programs: the same values either way."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any


def emit(result: Mapping[str, Any], tables: Mapping[str, Sequence[Mapping[str, Any]]], as_json: bool) -> None:
    """Print a result: as one JSON object on standard output, or as tables.

    Args:
        result: plain JSON values.
        tables: title to rows; the keys of the first row are the columns. Empty tables are left out.
        as_json: which.
    """
    if as_json:
        print(json.dumps(result, indent=1, default=str))
        return
    from rich.console import Console
    from rich.table import Table

    width = None if sys.stdout.isatty() else 140
    console = Console(width=width, highlight=False)
    for title, rows in tables.items():
        if not rows:
            continue
        table = Table(
            title=title or None, title_justify="left", box=None, pad_edge=False, header_style="bold"
        )
        for column in rows[0]:
            numeric = all(_is_number(row.get(column)) for row in rows)
            table.add_column(str(column), justify="right" if numeric else "left", overflow="fold")
        for row in rows:
            table.add_row(*(text(row.get(column, "")) for column in rows[0]))
        console.print(table)
        console.print()


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def text(value: Any) -> str:
    """A value as a table shows it: markup is never interpreted.

    >>> text(1234567), text(0.000123), text([1, 2])
    ('1,234,567', '0.000123', '1, 2')
    """
    from rich.markup import escape

    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return escape(", ".join(str(v) for v in value))
    return escape(str(value))


def note(message: str) -> None:
    """A line for the person at the terminal, on standard error."""
    print(message, file=sys.stderr)

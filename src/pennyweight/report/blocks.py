"""What a section of the report is made of: cards, tables, charts and texts, as plain values that one template draws."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pennyweight.registry import Registry

Content = dict[str, Any]


@dataclass(frozen=True)
class Card:
    """One figure before and after.

    Args:
        label: what it is.
        before, after: paths into the report's JSON ("summary.latency.float_ms"); "" for none.
        unit: behind the figures.
        digits: after the point.
        note: path of a figure below, such as a ratio, and how it is written, with `{}` for the figure.
    """

    label: str
    before: str
    after: str
    unit: str = ""
    digits: int = 2
    note: tuple[str, str] = ("", "")
    kind: str = "cards"


@dataclass(frozen=True)
class Column:
    """A column of a table: the key in each row, its title, and how it is drawn.

    Args:
        key: in the rows.
        title: for people.
        digits: of numbers, after the point.
        bar: draw a bar beside the number, as long as its share of the column's greatest.
        better: with `bar`, "high" or "low": which end is drawn as good; "" for neither.
    """

    key: str
    title: str
    digits: int = 2
    bar: bool = False
    better: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of the JSON under a path."""

    path: str
    columns: tuple[Column, ...]
    kind: str = "table"


@dataclass(frozen=True)
class Chart:
    """A Vega-Lite specification; its data are in it."""

    name: str
    label: str
    spec: dict[str, Any]
    kind: str = "chart"


@dataclass(frozen=True)
class Picker:
    """Charts of one kind, one shown at a time, chosen by name.

    Args:
        name: of the element.
        label: before the choice.
        spec: with an empty data set called "rows" and one called "marks".
        options: title and data sets of each.
    """

    name: str
    label: str
    spec: dict[str, Any]
    options: tuple[tuple[str, dict[str, Any]], ...]
    kind: str = "picker"


@dataclass(frozen=True)
class Text:
    """A paragraph, or lines of code."""

    text: str
    code: bool = False
    kind: str = "text"


Block = Card | Table | Chart | Picker | Text


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Args:
        title: its heading.
        order: where it stands.
        build: blocks of a report's content; none where there is nothing to show.
        intro: a sentence below the heading.
    """

    title: str
    order: int
    build: Callable[[Content], list[Block]]
    intro: str = ""
    names: tuple[str, ...] = field(default=())


sections: Registry[Section] = Registry("report sections", "pennyweight.report.parts")

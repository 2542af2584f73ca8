"""Weights and activations with the grid drawn over them."""

from __future__ import annotations

from typing import Any

import altair as alt

from pennyweight.report.blocks import Block, Content, Picker, Section, sections

LINES = 33  # levels that are drawn one by one; of finer grids the ends


def build(content: Content) -> list[Block]:
    """One chart at a time, the most clipped first."""
    rows = sorted(content["histograms"], key=lambda r: (r["part"] != "input", -r["clipped"]))
    if not rows:
        return []
    options = tuple((_title(r), _data(r)) for r in rows)
    return [Picker("histogram", "tensor", _spec(), options)]


def _title(row: dict[str, Any]) -> str:
    return f"{row['site']} ({row['part']}, {100 * row['clipped']:.2f} % clipped)"


def _data(row: dict[str, Any]) -> dict[str, Any]:
    width = (row["most"] - row["least"]) / len(row["counts"])
    bins = [
        {"from": row["least"] + i * width, "to": row["least"] + (i + 1) * width, "count": n,
         "where": "beyond the grid" if _beyond(row, row["least"] + (i + 0.5) * width) else "on the grid"}
        for i, n in enumerate(row["counts"])
    ]  # fmt: skip
    levels = round((row["hi"] - row["lo"]) / row["step"]) + 1 if row["step"] else 2
    marks = [row["lo"], row["hi"]] if levels > LINES else [row["lo"] + i * row["step"] for i in range(levels)]
    return {"rows": bins, "marks": [{"level": m} for m in marks]}


def _beyond(row: dict[str, Any], middle: float) -> bool:
    return bool(middle < row["lo"] - row["step"] / 2 or middle > row["hi"] + row["step"] / 2)


def _spec() -> dict[str, Any]:
    """Bars on a logarithmic axis, a line for each level (or for both ends) of the grid."""
    bars = (
        alt.Chart(alt.NamedData("rows"))
        .transform_calculate(shown="datum.count + 1")
        .mark_bar()
        .encode(
            x=alt.X("from:Q", title="value (weights: in codes)"),
            x2="to:Q",
            y=alt.Y("shown:Q", scale=alt.Scale(type="log"), title="count + 1"),
            y2=alt.Y2Datum(1),
            color=alt.Color(
                "where:N", scale=alt.Scale(domain=["on the grid", "beyond the grid"], range=["#4c8dd6", "#e4572e"]),
                title=None,
            ),
            tooltip=["from:Q", "to:Q", "count:Q", "where:N"],
        )
    )  # fmt: skip
    lines = (
        alt.Chart(alt.NamedData("marks"))
        .mark_rule(strokeDash=[3, 3], color="#8a8f98")
        .encode(x="level:Q", tooltip=["level:Q"])
    )
    chart = alt.layer(bars, lines).properties(width="container", height=260)
    spec: dict[str, Any] = chart.to_dict(validate=False)
    return spec


sections.add(
    "histograms",
    Section(
        "Weights and activations", 40, build, "Dashed: levels of the grid, or its two ends where it is fine."
    ),
)

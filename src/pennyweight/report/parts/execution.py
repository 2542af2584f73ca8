"""Which kernel ran for each layer, how long, and how long in float."""

from __future__ import annotations

from typing import Any

import altair as alt

from pennyweight.report.blocks import Block, Chart, Column, Content, Section, Table, sections

_COLUMNS = (
    Column("site", "layer"), Column("op", "op"), Column("kernel", "kernel"), Column("us", "µs", 1, bar=True),
    Column("share", "%", 1), Column("float_us", "float µs", 1), Column("speedup", "x", 2), Column("verdict", "verdict"),
)  # fmt: skip


def build(content: Content) -> list[Block]:
    """Bars of both sides, and the table."""
    rows = content["execution"]
    if not rows:
        return []
    data = [
        {"layer": r["site"] or "(model)", "side": side, "µs": r[key], "kernel": r["kernel"]}
        for r in rows for side, key in (("quantized", "us"), ("float", "float_us")) if r.get(key) is not None
    ]  # fmt: skip
    order = list(dict.fromkeys(r["site"] or "(model)" for r in rows))
    chart = (
        alt.Chart(alt.InlineData(values=data))
        .mark_bar()
        .encode(
            y=alt.Y("layer:N", sort=order, title=None),
            yOffset=alt.YOffset("side:N", sort=["quantized", "float"]),
            x=alt.X("µs:Q", title="microseconds a run"),
            color=alt.Color(
                "side:N",
                title=None,
                scale=alt.Scale(domain=["quantized", "float"], range=["#4c8dd6", "#9aa0a8"]),
            ),
            tooltip=["layer:N", "side:N", "µs:Q", "kernel:N"],
        )
        .properties(width="container", height=alt.Step(9))
    )
    spec: dict[str, Any] = chart.to_dict(validate=False)
    shown = tuple(c for c in _COLUMNS if any(r.get(c.key) is not None for r in rows))
    return [Chart("execution", "Time of the layers", spec), Table("execution", shown)]


sections.add("execution", Section("Execution", 60, build))

"""Everything that a search tried: cost against loss."""

from __future__ import annotations

from typing import Any

import altair as alt

from pennyweight.report.blocks import Block, Chart, Column, Content, Section, Table, sections

_COSTS = {
    "latency": ("latency_ms", "latency, ms"),
    "size": ("bytes", "bytes"),
    "bops": ("bops", "bit operations"),
}
_COLUMNS = (
    Column("number", "", 0), Column("rung", "rung"), Column("name", "recipe"), Column("score", "score", 3),
    Column("drop", "drop", 3), Column("latency_ms", "ms", 3, bar=True, better="low"), Column("speedup", "x float"),
    Column("bytes", "bytes", 0, bar=True, better="low"), Column("seconds", "s", 1), Column("met", "goal"),
    Column("front", "front"), Column("chosen", "chosen"),
)  # fmt: skip


def build(content: Content) -> list[Block]:
    """A point a trial, a line along the front."""
    trials = content["trials"]
    if not trials:
        return []
    key, title = _COSTS.get(content["goal"].get("minimize", "latency"), _COSTS["latency"])
    role = {True: "chosen", False: "on the front"}
    data = [
        {**{k: t.get(k) for k in ("number", "rung", "name", "score", "drop", "latency_ms", "bytes")},
         "cost": t.get(key), "role": role[bool(t["chosen"])] if t["front"] or t["chosen"] else "beaten"}
        for t in trials
    ]  # fmt: skip
    base = alt.Chart(alt.InlineData(values=data))
    axes = {
        "x": alt.X("cost:Q", title=title, scale=alt.Scale(zero=False)),
        "y": alt.Y("drop:Q", title="loss against float"),
    }
    points = base.mark_point(filled=True, size=110).encode(
        **axes,
        color=alt.Color(
            "role:N", title=None,
            scale=alt.Scale(domain=["chosen", "on the front", "beaten"], range=["#e4572e", "#4c8dd6", "#9aa0a8"]),
        ),
        tooltip=["number:Q", "rung:N", "name:N", "score:Q", "drop:Q", "latency_ms:Q", "bytes:Q"],
    )  # fmt: skip
    line = (
        base.transform_filter("datum.role != 'beaten'").mark_line(color="#4c8dd6", opacity=0.6).encode(**axes)
    )
    layers = [line, points]
    limit = content["goal"].get("max_drop")
    if isinstance(limit, int | float):
        rule = alt.Chart(alt.InlineData(values=[{"limit": limit}])).mark_rule(
            strokeDash=[5, 4], color="#8a8f98"
        )
        layers.append(rule.encode(y="limit:Q", tooltip=["limit:Q"]))
    chart = alt.layer(*layers).properties(width="container", height=300)
    spec: dict[str, Any] = chart.to_dict(validate=False)
    return [Chart("front", "Trials: cost against loss", spec), Table("trials", _COLUMNS)]


sections.add(
    "front", Section("Search", 15, build, "The dashed line is the accepted loss; point at a trial for more.")
)

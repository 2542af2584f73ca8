"""What each layer does to the output, alone, in each format."""

from __future__ import annotations

from typing import Any

import altair as alt

from pennyweight.report.blocks import Block, Chart, Content, Section, sections

MOST = 60  # layers that are drawn, the most sensitive


def build(content: Content) -> list[Block]:
    """A bar a layer and format."""
    rows = content["sensitivity"]
    if not rows:
        return []
    by_layer: dict[str, float] = {}
    for row in rows:
        by_layer[row["site"]] = max(by_layer.get(row["site"], 0.0), -row["sqnr_db"] + 400)
    kept = sorted(by_layer, key=lambda n: -by_layer[n])[:MOST]
    order = [n for n in dict.fromkeys(r["site"] for r in rows) if n in kept]
    data = [
        {"layer": r["site"], "format": r["form"], "noise": 10 ** (-r["sqnr_db"] / 10), "dB": r["sqnr_db"],
         "KL": r["kl"]}
        for r in rows if r["site"] in kept
    ]  # fmt: skip
    chart = (
        alt.Chart(alt.InlineData(values=data))
        .mark_point(filled=True, size=60)
        .encode(
            y=alt.Y("layer:N", sort=order, title=None),
            x=alt.X(
                "noise:Q",
                scale=alt.Scale(type="log"),
                title="noise to signal at the output, this layer alone",
            ),
            color=alt.Color("format:N", title=None, scale=alt.Scale(scheme="tableau10")),
            tooltip=["layer:N", "format:N", "dB:Q", "KL:Q"],
        )
        .properties(width="container", height=alt.Step(16))
    )
    spec: dict[str, Any] = chart.to_dict(validate=False)
    return [Chart("sensitivity", "Sensitivity of the layers", spec)]


sections.add("sensitivity", Section("Sensitivity", 50, build, "Further right hurts more."))

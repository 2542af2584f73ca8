"""Accuracy, latency and size before and after."""

from __future__ import annotations

from pennyweight.report.blocks import Block, Card, Content, Section, sections


def build(content: Content) -> list[Block]:
    """Cards of what was measured."""
    summary, found = content["summary"], list[Block]()
    if "accuracy" in summary:
        label = f"Accuracy ({summary['accuracy']['metric']})"
        found.append(Card(label, "summary.accuracy.float", "summary.accuracy.quantized",
                          note=("summary.accuracy.change", "change {}")))  # fmt: skip
    if "latency" in summary:
        found.append(Card("Latency", "summary.latency.float", "summary.latency.quantized", "ms", 3,
                          ("summary.latency.ratio", "{} x as fast")))  # fmt: skip
    if "size" in summary:
        found.append(Card("Size", "summary.size.float", "summary.size.quantized", "bytes", 0,
                          ("summary.size.ratio", "{} x smaller")))  # fmt: skip
    if "output" in summary:
        found.append(Card("Outputs", "", "summary.output.sqnr_db", "dB from float", 1,
                          ("summary.output.agree", "same greatest entry on {} %")))  # fmt: skip
    return found


sections.add("summary", Section("Before and after", 10, build))

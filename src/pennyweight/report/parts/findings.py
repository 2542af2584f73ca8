"""Causes of lost accuracy or time, and what trying their remedies gained."""

from __future__ import annotations

from pennyweight.report.blocks import Block, Column, Content, Section, Table, sections

_COLUMNS = (
    Column("rank", "", 0), Column("cause", "cause"), Column("site", "where"), Column("what", "what"),
    Column("remedy", "remedy"), Column("gain_db", "gain, dB", 1, bar=True, better="high"),
    Column("gain_us", "gain, µs", 1),
)  # fmt: skip


def build(content: Content) -> list[Block]:
    """The table."""
    rows = content["findings"]
    kept = tuple(c for c in _COLUMNS if any(r.get(c.key) is not None for r in rows))
    return [Table("findings", kept)] if rows else []


sections.add(
    "findings", Section("Diagnosis", 20, build, "Likeliest cause first; gains were measured by trying.")
)

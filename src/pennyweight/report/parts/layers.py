"""The table of layers."""

from __future__ import annotations

from pennyweight.report.blocks import Block, Column, Content, Section, Table, Text, sections

_COLUMNS = (
    Column("layer", "layer"),
    Column("weight", "weight"),
    Column("input", "input"),
    Column("sqnr_db", "weight SQNR, dB", 1, bar=True, better="high"),
    Column("alone_db", "output with it alone, dB", 1, bar=True, better="high"),
    Column("clipped", "clipped, %", 2, bar=True, better="low"),
    Column("bytes", "bytes", 0, bar=True),
    Column("us", "µs", 1, bar=True, better="low"),
    Column("float_us", "float µs", 1),
)


def build(content: Content) -> list[Block]:
    """Columns that any layer has something in; what stays in float, and why."""
    rows, blocks = content["layers"], list[Block]()
    if rows:
        blocks.append(
            Table("layers", tuple(c for c in _COLUMNS if any(r.get(c.key) is not None for r in rows)))
        )
    if content["kept"]:
        blocks.append(Text(f"{len(content['kept'])} in float:"))
        blocks.append(Table("kept", (Column("site", "layer"), Column("reason", "why"))))
    return blocks


sections.add("layers", Section("Layers", 30, build))

"""How to make the model again."""

from __future__ import annotations

from pennyweight.report.blocks import Block, Content, Section, Text, sections


def build(content: Content) -> list[Block]:
    """The recipe's text, the versions, and notes of the run."""
    blocks: list[Block] = [Text(note) for note in content["notes"]]
    if content["recipe"]:
        blocks.append(Text(content["recipe"], code=True))
        blocks.append(
            Text("Save it as recipe.toml, then: pennyweight quantize MODEL --calib DATA --recipe recipe.toml")
        )
    versions = ", ".join(f"{k} {v}" for k, v in content["versions"].items())
    machine = ", ".join(f"{m['cpu']}, {m['threads']} threads" for m in content["machine"])
    made = "; ".join(part for part in (content["model"], versions, machine) if part)
    return [*blocks, Text(f"Made from {made}.")] if made else blocks


sections.add("recipe", Section("How to make it again", 90, build))

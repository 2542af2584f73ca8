"""From the journal to the report's JSON: every figure that the page shows, once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pennyweight.journal import Journal

Content = dict[str, Any]


def content_of(journal: Journal, facts: Mapping[str, Any]) -> Content:
    """Plain JSON values.

    Args:
        journal: of a converted model, a file or a search.
        facts: "title", "model", "recipe" (its text), "versions", as far as known.
    """
    chosen = journal.rows("chosen")[-1:]
    trials = journal.rows("trial")
    content: Content = {
        "title": str(facts.get("title", "Pennyweight report")),
        "model": str(facts.get("model", "")),
        "recipe": str(facts.get("recipe", "")),
        "versions": dict(facts.get("versions", {})),
        "summary": _summary(journal, trials, chosen),
        "layers": _layers(journal),
        "histograms": journal.rows("histogram"),
        "sensitivity": [r for r in journal.rows("sensitivity") if r.get("part") == "both"],
        "sensitivity_parts": [r for r in journal.rows("sensitivity") if r.get("part") != "both"],
        "trials": _marked(trials, journal.rows("front"), chosen),
        "goal": chosen[0].get("goal", {}) if chosen else {},
        "execution": journal.rows("execution"),
        "findings": journal.rows("finding"),
        "kept": journal.rows("kept"),
        "notes": [str(r["text"]) for r in journal.rows("note") if "text" in r],
        "machine": journal.rows("machine")[-1:],
    }
    return content


def _summary(
    journal: Journal, trials: list[dict[str, Any]], chosen: list[dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Accuracy, latency and size before and after, from what was measured last."""
    found: dict[str, dict[str, Any]] = {}
    size = journal.rows("size")[-1:]
    if size:
        before, after = size[0]["before"], size[0]["after"]
        found["size"] = {"float": before, "quantized": after, "ratio": before / max(after, 1)}
    accuracy = journal.rows("accuracy")[-1:]
    if accuracy:
        row = accuracy[0]
        change = row["quantized"] - row["float"]
        found["accuracy"] = {k: row[k] for k in ("float", "quantized")}
        found["accuracy"] |= {"change": change, "metric": row.get("metric", "score")}
    elif chosen and trials:
        found["accuracy"] = {"float": trials[0]["score"], "quantized": chosen[0]["score"],
                             "change": chosen[0]["score"] - trials[0]["score"], "metric": "score"}  # fmt: skip
    latency = journal.rows("latency")[-1:]
    if latency:
        row = latency[0]
        found["latency"] = {"float": row["float_ms"], "quantized": row["ms"], "ratio": row["speedup"]}
    elif chosen and trials:
        found["latency"] = {"float": trials[0]["latency_ms"], "quantized": chosen[0]["latency_ms"],
                            "ratio": chosen[0]["speedup"]}  # fmt: skip
    output = journal.rows("output")[-1:]
    if output:
        found["output"] = {"sqnr_db": output[0]["sqnr_db"], "agree": 100 * output[0]["agree"]}
    return found


def _layers(journal: Journal) -> list[dict[str, Any]]:
    """One row a layer: specs, errors of weights, clipped shares, sizes, noise at the output, times."""
    rows: dict[str, dict[str, Any]] = {}

    def row(layer: str) -> dict[str, Any]:
        return rows.setdefault(layer, {"layer": layer})

    for event in journal.of("weight"):
        layer = event.site.rpartition(":")[0]
        found = row(layer)
        found |= {"weight": event.data.get("spec", ""), "sqnr_db": event.data.get("sqnr_db")}
        found["bytes"] = event.data.get("after", 0) + found.get("bytes", 0)
        found["float_bytes"] = event.data.get("before", 0) + found.get("float_bytes", 0)
    for event in journal.of("site"):
        layer, _, tensor = event.site.rpartition(":")
        if tensor.startswith("input") and layer in rows:
            row(layer)["input"] = event.data.get("spec", "")
    for event in journal.of("histogram"):
        if event.data.get("part") == "input" and event.data.get("layer") in rows:
            row(event.data["layer"])["clipped"] = 100 * event.data["clipped"]
    for event in journal.of("diagnosed"):
        if event.site in rows:
            row(event.site)["alone_db"] = event.data.get("alone_db")
    for event in journal.of("execution"):
        if event.site in rows:
            row(event.site)["us"] = event.data.get("us")
            row(event.site)["float_us"] = event.data.get("float_us")
    return list(rows.values())


def _marked(
    trials: list[dict[str, Any]], front: list[dict[str, Any]], chosen: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Trials with their number, and whether they are on the front and chosen."""
    key = ("name", "score", "latency_ms", "bytes")
    best = {tuple(r.get(k) for k in key) for r in front}
    final = {tuple(r.get(k) for k in key) for r in chosen}
    return [
        {
            "number": i, "rung": r["site"], **{k: v for k, v in r.items() if k not in ("site", "formats")},
            "front": tuple(r.get(k) for k in key) in best, "chosen": tuple(r.get(k) for k in key) in final,
        }
        for i, r in enumerate(trials)
    ]  # fmt: skip

"""`pennyweight inspect`: what a .dwt file holds."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer

from pennyweight.cli.options import Json
from pennyweight.cli.output import emit


def command(
    file: Annotated[Path, typer.Argument(help="A .dwt file.")],
    program: Annotated[bool, typer.Option("--program", help="Show every op.")] = False,
    constants: Annotated[bool, typer.Option("--constants", help="Show every constant.")] = False,
    journal: Annotated[bool, typer.Option("--journal", help="Show the journal.")] = False,
    json: Json = False,
) -> None:
    """Show what FILE holds.

    Inputs, outputs, ops, sizes, specs, and how it was made.
    """
    from pennyweight.runtime import load

    session = load(file, backend="reference")
    result = facts(session, file)
    shown: dict[str, Any] = {"": _overview(result), "ops": result["ops"], "specs": result["specs"]}
    if program:
        shown["program"] = result["program"]
    if constants:
        shown["constants"] = result["constants"]
    if journal:
        shown["journal"] = [
            {
                "kind": e["kind"],
                "site": e["site"],
                "data": ", ".join(f"{k}={v}" for k, v in e["data"].items()),
            }
            for e in result["journal"]
        ]
    emit(result, shown, json)


def facts(session: Any, file: Path) -> dict[str, Any]:
    """Everything in a file as plain values."""
    program, meta = session.program, session.program.meta
    events = [{"kind": k, "site": s, "data": d} for k, s, d in meta.get("journal", [])]
    specs = Counter(str(e["data"].get("spec", "")) for e in events if e["kind"] == "site")
    return {
        "file": str(file),
        "bytes": file.stat().st_size,
        "inputs": [str(p) for p in session.inputs],
        "outputs": [str(p) for p in session.outputs],
        "constant_bytes": program.nbytes,
        "model": meta.get("model", ""),
        "recipe": meta.get("recipe", ""),
        "versions": meta.get("versions", {}),
        "difference": meta.get("difference"),
        "ops": [{"op": kind, "count": n} for kind, n in Counter(op.kind for op in program.ops).most_common()],
        "specs": [{"spec": spec, "sites": n} for spec, n in specs.most_common()],
        "program": [
            {"results": list(op.outputs), "op": op.kind, "operands": list(op.inputs), "site": op.site,
             "attributes": " ".join(f"{k}={v}" for k, v in op.attrs.items())}
            for op in program.ops
        ],
        "constants": [
            {"name": n, "dtype": c.dtype, "shape": list(c.data.shape), "bytes": c.data.nbytes}
            for n, c in program.constants.items()
        ],
        "journal": events,
    }  # fmt: skip


def _overview(result: dict[str, Any]) -> list[dict[str, Any]]:
    rows = [{"": "file", "value": result["file"]}]
    rows.append(
        {"": "bytes", "value": f"{result['bytes']:,}, of which constants {result['constant_bytes']:,}"}
    )
    rows += [{"": "input", "value": text} for text in result["inputs"]]
    rows += [{"": "output", "value": text} for text in result["outputs"]]
    rows.append({"": "made from", "value": result["model"] or "unknown"})
    first = result["recipe"].strip().splitlines()[:1]
    rows.append({"": "recipe", "value": "".join(first) or "unknown"})
    rows.append(
        {"": "made with", "value": ", ".join(f"{k} {v}" for k, v in result["versions"].items()) or "unknown"}
    )
    kept = [e for e in result["journal"] if e["kind"] == "kept"]
    rows.append({"": "kept in float", "value": ", ".join(e["site"] for e in kept) or "nothing"})
    if result["difference"]:
        d = result["difference"]
        rows.append(
            {
                "": "difference",
                "value": f"{d['max_abs']:.3g} at most from the eager model, {d['sqnr_db']:.1f} dB",
            }
        )
    return rows

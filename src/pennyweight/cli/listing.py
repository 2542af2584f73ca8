"""`pennyweight list`: everything that is registered, by kind."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Annotated, Any

import typer

from pennyweight.cli.options import Json, recipe_names
from pennyweight.cli.output import emit
from pennyweight.errors import KernelError, RegistryError, nearest

Rows = list[dict[str, Any]]


def kinds() -> list[str]:
    """What can be listed."""
    return list(KINDS)


def command(
    kind: Annotated[str, typer.Argument(help="One kind; all of them otherwise.", autocompletion=kinds)] = "",
    json: Json = False,
) -> None:
    """List what is registered.

    Kinds: grids, statistics, ranges, solvers, estimators, passes, recipes, twins, ops, exporters, kernels,
    methods and targets (of language models).
    """
    if kind and kind not in KINDS:
        raise RegistryError(f"{kind!r} is no kind of entry", hint=nearest(kind, KINDS, "kinds"))
    found = {name: rows() for name, rows in KINDS.items() if kind in ("", name)}
    emit(found, found, json)


def first_line(text: str | None) -> str:
    """The first line of a documentation."""
    lines = (text or "").strip().splitlines()
    return lines[0].strip() if lines else ""


def _registered(module: str, name: str) -> Callable[[], Rows]:
    def rows() -> Rows:
        registry = getattr(import_module(f"pennyweight.{module}"), name)
        return [{"name": key, "what": first_line(getattr(registry[key], "__doc__", ""))} for key in registry]

    return rows


def _recipes() -> Rows:
    from pennyweight.recipe import Recipe

    found = []
    for name in recipe_names():
        steps = [type(step).__name__ for step in Recipe.preset(name).passes]
        found.append({"name": name, "what": " -> ".join(steps)})
    return found


def _ops() -> Rows:
    from pennyweight.program.ops import definitions

    return [
        {
            "name": kind,
            "what": first_line(definition.doc),
            "attributes": sorted(definition.attrs),
            "bits": "exact" if definition.exact else "tolerance",
        }
        for kind, definition in sorted(definitions.items())
    ]


def _kernels() -> Rows:
    """The native library's kernel table; one row that says why, if there is no library."""
    from pennyweight.runtime import library

    try:
        table = library.kernels()
    except (KernelError, OSError, AttributeError) as error:  # AttributeError: a library of another version
        return [{"op": "-", "isa": "-", "symbol": f"no native library: {' '.join(str(error).split())}"}]
    return [{"op": op, "isa": isa, "symbol": symbol} for op, isa, symbol in table]


def _methods() -> Rows:
    """How codes of language models are found."""
    from pennyweight.llm.methods import methods

    return [{"name": name, "what": method.about} for name, method in methods.items()]


KINDS: dict[str, Callable[[], Rows]] = {
    "grids": _registered("formats", "grids"),
    "statistics": _registered("stats", "stats"),
    "ranges": _registered("ranges", "ranges"),
    "solvers": _registered("solvers", "solvers"),
    "estimators": _registered("gradients", "estimators"),
    "passes": _registered("passes", "passes"),
    "recipes": _recipes,
    "twins": _registered("nn", "twins"),
    "ops": _ops,
    "exporters": _registered("exporters", "exporters"),
    "kernels": _kernels,
    "methods": _methods,
    "targets": _registered("llm.targets", "targets"),
}

"""Options that several verbs share."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from pennyweight.recipe import Recipe

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Backend = Annotated[str, typer.Option(help="auto, native or reference.")]
Threads = Annotated[int, typer.Option(min=0, help="Threads of the engine; 0 for one per core.")]
Batch = Annotated[int, typer.Option(min=1, help="Samples a batch.")]
Limit = Annotated[int, typer.Option(min=0, help="Samples at most; 0 for all.")]


def recipe_names() -> list[str]:
    """Names of the recipes that ship, found without importing torch."""
    folder = resources.files("pennyweight") / "recipes"
    return sorted(f.name.removesuffix(".toml") for f in folder.iterdir() if f.name.endswith(".toml"))


RecipeName = Annotated[
    str,
    typer.Option(
        help=f"A recipe, or a .toml file: {', '.join(recipe_names())}.", autocompletion=recipe_names
    ),
]


def find_recipe(name: str) -> Recipe:
    """A recipe by name, or from a `.toml` file.

    Raises:
        RecipeError: if there is no such recipe, or the text is none.
        OSError: if the file is not there.
    """
    from pennyweight.recipe import Recipe

    if name.endswith(".toml"):
        return Recipe.parse(Path(name).read_text("utf8"))
    return Recipe.preset(name)


def numbers(text: str, what: str) -> tuple[float, ...]:
    """A comma-separated list of numbers.

    Raises:
        typer.BadParameter: if it is none.
    """
    try:
        return tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise typer.BadParameter(f"{what} {text!r} is no list of numbers such as 0.5,0.5,0.5") from None

"""Recipes: rules and a chain of passes, as a value with a TOML text form. Presets are files, never code."""

from __future__ import annotations

import dataclasses
import json
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any, Literal

from pennyweight.errors import PennyweightError, RecipeError, RegistryError, nearest
from pennyweight.passes import Context, Pass, passes
from pennyweight.plan import Rule
from pennyweight.spec import QuantSpec

_RULE_FIELDS = {f.name for f in dataclasses.fields(Rule)}


@dataclass(frozen=True)
class Recipe:
    """What to quantize (rules, the first that matches a layer decides) and how (passes, in order).

    Args:
        name: for the journal and the file.
        rules: see `Rule`.
        passes: see `Pass`; stages run in the order float, train, adapt, calibrate, solve.

    >>> Recipe.parse(Recipe.preset("int8").to_text()) == Recipe.preset("int8")
    True
    """

    name: str = "custom"
    rules: tuple[Rule, ...] = ()
    passes: tuple[Pass, ...] = field(default_factory=tuple)

    @classmethod
    def preset(cls, name: str) -> Recipe:
        """A recipe that ships with the package.

        Raises:
            RecipeError: if there is no such preset.
        """
        if name not in presets():
            raise RecipeError(f"there is no recipe {name!r}", hint=nearest(name, presets(), "recipes"))
        return cls.parse((resources.files("pennyweight") / "recipes" / f"{name}.toml").read_text("utf8"))

    @classmethod
    def parse(cls, text: str) -> Recipe:
        """Read the text form.

        Raises:
            RecipeError: on text that is no TOML, unknown keys, and values that do not fit.
        """
        try:
            data = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise RecipeError(f"the recipe is not TOML: {error}") from error
        unknown = set(data) - {"name", "rules", "passes"}
        if unknown:
            key = sorted(unknown)[0]
            raise RecipeError(f"unknown key {key!r}", hint=nearest(key, ["name", "rules", "passes"], "keys"))
        rules = tuple(_rule(r) for r in data.get("rules", []))
        return cls(str(data.get("name", "custom")), rules, tuple(_pass(p) for p in data.get("passes", [])))

    def to_text(self) -> str:
        """The TOML text form."""
        lines = [f"name = {json.dumps(self.name)}"]
        for rule in self.rules:
            lines += ["", "[[rules]]"]
            for f in dataclasses.fields(rule):
                value = getattr(rule, f.name)
                if value != f.default:
                    lines.append(f"{f.name} = {_toml(str(value) if isinstance(value, QuantSpec) else value)}")
        names = {entry: name for name, entry in passes.items()}
        for step in self.passes:
            lines += ["", "[[passes]]", f"pass = {_toml(names[type(step)])}"]
            for f in dataclasses.fields(step):  # type: ignore[arg-type]
                lines.append(f"{f.name} = {_toml(getattr(step, f.name))}")
        return "\n".join(lines) + "\n"

    def with_rules(self, *rules: Rule) -> Recipe:
        """The same recipe with further rules in front, which therefore win."""
        return dataclasses.replace(self, rules=(*rules, *self.rules))

    def keep(self, *matches: str, dtype: Literal["float32", "float16", "bfloat16"] = "float32") -> Recipe:
        """The same recipe with these layers (globs) left in float."""
        return self.with_rules(*(Rule(m, keep=dtype) for m in matches))

    @property
    def trains(self) -> bool:
        """Whether a model prepared with it trains."""
        return any(step.stage == "train" for step in self.passes)

    @property
    def replays(self) -> bool:
        """Whether a pass reads the calibration batches again."""
        return any(getattr(step, "replays", False) for step in self.passes)

    @property
    def data_free(self) -> bool:
        """Whether the example may stand in for calibration data."""
        return any(getattr(step, "data_free", False) for step in self.passes)

    def needs(self) -> set[str]:
        """Statistics that any pass asks for."""
        return {name for step in self.passes for name in step.needs()}

    def run(self, context: Context, stage: str) -> None:
        """Run the passes of one stage."""
        for step in self.passes:
            if step.stage == stage:
                step.run(context)


def chain(*steps: Recipe | Pass | Rule, name: str = "custom") -> Recipe:
    """One recipe from recipes, passes and rules, in order. Chaining recipes gives a recipe."""
    rules: list[Rule] = []
    found: list[Pass] = []
    for step in steps:
        if isinstance(step, Recipe):
            rules += step.rules
            found += step.passes
        elif isinstance(step, Rule):
            rules.append(step)
        else:
            found.append(step)
    return Recipe(name, tuple(rules), tuple(found))


def presets() -> list[str]:
    """Names of the recipes that ship with the package."""
    folder = resources.files("pennyweight") / "recipes"
    return sorted(f.name.removesuffix(".toml") for f in folder.iterdir() if f.name.endswith(".toml"))


def _rule(data: dict[str, Any]) -> Rule:
    _check_keys(data, _RULE_FIELDS, "rule keys")
    fields = dict(data)
    for key in ("weight", "input"):
        if key in fields:
            fields[key] = QuantSpec.parse(fields[key])
    if "types" in fields:
        fields["types"] = tuple(fields["types"])
    if fields.get("keep", "float32") not in ("float32", "float16", "bfloat16"):
        raise RecipeError(f"keep = {fields['keep']!r}", hint="One of float32, float16, bfloat16.")
    return Rule(**fields)


def _pass(data: dict[str, Any]) -> Pass:
    fields = dict(data)
    name = fields.pop("pass", None)
    try:
        kind = passes[str(name)]
        _check_keys(fields, {f.name for f in dataclasses.fields(kind)}, f"options of {name}")  # type: ignore[arg-type]
        step = kind(**fields)
        step.needs()
    except RegistryError as error:
        raise RecipeError(error.what, hint=error.hint) from error
    except TypeError as error:
        raise RecipeError(f"pass {name!r}: {error}") from error
    return step


def _check_keys(data: dict[str, Any], known: Sequence[str] | set[str], what: str) -> None:
    for key in data:
        if key not in known:
            raise RecipeError(f"unknown key {key!r}", hint=nearest(key, known, what))


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{k} = {_toml(v)}" for k, v in value.items()) + " }" if value else "{}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml(v) for v in value) + "]"
    if isinstance(value, str):
        return json.dumps(value)
    if isinstance(value, int | float):
        return repr(value)
    raise PennyweightError(f"{value!r} has no place in a recipe text")

"""Recipes are values with a text form; what does not fit is named with the nearest that does."""

import pytest

from pennyweight.errors import RecipeError
from pennyweight.passes.calibrate import Calibrate
from pennyweight.plan import Rule
from pennyweight.recipe import Recipe, chain, presets
from pennyweight.spec import QuantSpec


@pytest.mark.parametrize("name", presets())
def test_presets_round_trip(name):
    recipe = Recipe.preset(name)
    assert recipe.name == name
    assert Recipe.parse(recipe.to_text()) == recipe
    assert recipe.rules


def test_the_presets_that_are_promised():
    assert {"int8", "int8-dynamic", "int8-weight", "int4-weight"} <= set(presets())


def test_rules_put_in_front_win():
    recipe = Recipe.preset("int8").keep("head", "*.last", dtype="bfloat16")
    assert [r.keep for r in recipe.rules[:2]] == ["bfloat16", "bfloat16"]
    assert recipe.rules[0].match == "head"
    assert Recipe.parse(recipe.to_text()) == recipe
    assert recipe.passes == Recipe.preset("int8").passes


def test_chaining_is_closed():
    rule = Rule("x", weight=QuantSpec.parse("int8[1,*]"))
    step = Calibrate("percentile", {"p": 0.99})
    both = chain(rule, Recipe.preset("int8"), chain(step), name="mine")
    assert both.rules == (rule, *Recipe.preset("int8").rules)
    assert both.passes == (*Recipe.preset("int8").passes, step)
    assert Recipe.parse(both.to_text()) == both
    assert "histogram" in both.needs()


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("name = ", "not TOML"),
        ("nam = 'a'", "name"),
        ("[[rules]]\nwieght = 'int8[1,*]'", "weight"),
        ("[[rules]]\nkeep = 'float8'", "float32, float16, bfloat16"),
        ("[[passes]]\npass = 'calibrat'", "calibrate"),
        ("[[passes]]\npass = 'calibrate'\nrnage = 'mse'", "range"),
        ("[[passes]]\npass = 'calibrate'\nrange = 'minmx'", "minmax"),
        ("[[passes]]\npass = 'calibrate'\nrange = 'mse'\noptions = { stps = 3 }", "stps"),
    ],
)
def test_mistakes(text, what):
    with pytest.raises(RecipeError) as caught:
        Recipe.parse(text)
    assert what in str(caught.value)


def test_an_unknown_preset():
    with pytest.raises(RecipeError, match="int8"):
        Recipe.preset("int9")

"""`tune` with a goal: the ladder, limits, budgets, training, and what it leaves behind."""

import copy

import pytest
import torch

import pennyweight as pw
from pennyweight.errors import EmptyCalibration, InputError
from pennyweight.tune import ladder
from pennyweight.tune.goal import Goal, Tuning
from pennyweight.tune.ladder import rungs


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """Rounding is learned where a test says so."""
    monkeypatch.setattr(ladder, "MOST_STEPS", 0)


def accuracy(x, y):
    return lambda model: 100 * float((model(x).argmax(1) == y).float().mean())


def run(quarters, goal, **options):
    model, x, y = quarters
    options = {"samples": 32, "threads": 1, "progress": False, **options}
    evaluate = options.pop("evaluate", accuracy(x[128:], y[128:]))
    return pw.tune(model, x[:128].split(32), evaluate=evaluate, goal=goal, **options)


def test_an_easy_goal_is_met_on_the_first_rungs(quarters):
    found = run(quarters, Goal(max_drop=1.0))
    assert isinstance(found, Tuning)
    assert found.met
    assert found.trials[0].rung == "float"
    assert found.chosen.drop <= 1.0
    assert found.chosen.bytes < found.trials[0].bytes
    events = pw.journal(found.model)
    assert len(events.of("trial")) == len(found.trials)
    assert events.last("chosen").data["name"] == found.chosen.name
    score = accuracy(quarters[1][128:], quarters[2][128:])
    with torch.no_grad():
        assert abs(score(found.model) - found.chosen.score) <= 100 / 256 + 1e-6  # one image may be a tie


def test_size_is_minimised_by_mixing_formats_and_is_verified(quarters):
    found = run(quarters, Goal(max_drop=3.0, minimize="size"), formats=("int8", "int4"))
    mixes = [t for t in found.trials if t.rung == "mixed"]
    assert mixes
    uniform = found.trials[1]
    assert not uniform.assignment
    assert found.chosen.bytes < uniform.bytes
    assert found.chosen in mixes
    assert "int4" in found.chosen.assignment.values()
    assert found.chosen.drop <= 3.0
    assert found.sensitivity is not None
    assert found.sensitivity.rows
    assert [t.bytes for t in found.front] == sorted(t.bytes for t in found.front)
    again = pw.quantize(quarters[0], quarters[1][:128].split(32), found.recipe, progress=False)
    x = quarters[1][:16]
    with torch.no_grad():
        assert torch.equal(again(x), found.model(x))


def test_the_same_seed_gives_the_same_choice(quarters):
    goal = Goal(max_drop=3.0, minimize="size")
    first, second = (run(quarters, goal, formats=("int8", "int4"), seed=3) for _ in range(2))
    assert [t.assignment for t in first.trials] == [t.assignment for t in second.trials]
    assert [t.score for t in first.trials] == [t.score for t in second.trials]


def test_a_goal_out_of_reach_gives_the_least_loss(quarters, monkeypatch):
    scores = iter([90.0])

    def evaluate(model):
        return next(scores, 80.0)  # whatever is not the float model is ten points worse

    monkeypatch.setattr(ladder, "MOST_STEPS", 2)
    monkeypatch.setattr(ladder, "FEWEST_STEPS", 1)
    found = run(quarters, Goal(max_drop=0.5, minimize="size"), evaluate=evaluate)
    assert not found.met
    assert found.stopped == "ladder"
    names = [t.rung for t in found.trials]
    assert names[:3] == ["float", "calibrated", "bias-corrected"] or "data-free" in names
    assert [n for n in names if n in ("retargeted", "reconstructed")] == ["retargeted", "reconstructed"]
    assert "mixed" in names
    assert names.index("mixed") < names.index("mixed, retargeted")
    assert found.chosen.drop == 10
    learned = next(t for t in found.trials if t.rung == "reconstructed")
    assert [type(p).__name__ for p in learned.recipe.passes if type(p).__name__ in ("Solve", "AdaRound")] == [
        "AdaRound"
    ]


def test_a_budget_ends_the_search(quarters):
    found = run(quarters, Goal(max_drop=0.0), evaluate=lambda model: float(torch.rand(())), budget=0.01)
    assert found.stopped == "budget"
    assert len(found.trials) >= 2  # float, and what was begun
    assert found.model is not None


def test_training_is_the_last_rung(quarters):
    _, x, y = quarters

    def evaluate(candidate):
        plain = accuracy(x[128:], y[128:])(candidate)
        compiled = getattr(candidate, "module", candidate)
        state = getattr(compiled, "_pennyweight", None)
        return plain if state is None or state.recipe.trains else 0.0

    found = run(
        quarters,
        Goal(max_drop=5.0),
        evaluate=evaluate,
        formats=("int8",),
        budget=None,
        train_steps=16,
        train=lambda: list(zip(x[:128].split(32), y[:128].split(32), strict=True)),
    )
    assert found.trials[-1].rung == "trained"
    assert found.met
    assert found.chosen.rung == "trained"


def test_a_limit_of_size_is_kept(quarters):
    free = run(quarters, Goal(max_drop=100.0), formats=("int8",))
    limit = free.chosen.bytes * 0.8
    found = run(quarters, Goal(max_drop=50.0, limit_size=limit), formats=("float32", "int8", "int4"))
    assert found.met
    assert found.chosen.bytes <= limit


def test_rungs_without_a_recipe_are_left_out(monkeypatch):
    monkeypatch.setattr(ladder, "DATA_FREE", ("int8-dynamic",))
    names = [r.name for r in rungs(pw.Recipe.preset("int8"))]
    assert names == [
        "data-free", "calibrated", "bias-corrected", "retargeted", "reconstructed", "run-time ranges",
    ]  # fmt: skip
    monkeypatch.setattr(ladder, "DATA_FREE", ("no-such-recipe",))
    assert [r.name for r in rungs(pw.Recipe.preset("int8"))][0] == "calibrated"


def test_wrong_arguments_are_refused(quarters):
    model, x, _ = quarters
    with pytest.raises(InputError, match="Did you mean 'native'"):
        pw.tune(model, [x], evaluate=lambda m: 0.0, goal=Goal(), target="nativ")
    with pytest.raises(InputError, match="Did you mean 'int4'"):
        pw.tune(model, [x], evaluate=lambda m: 0.0, goal=Goal(), formats=("int44",))
    with pytest.raises(EmptyCalibration):
        pw.tune(model, [], evaluate=lambda m: 0.0, goal=Goal())


def test_the_model_is_left_alone(quarters):
    before = copy.deepcopy(quarters[0].state_dict())
    run(quarters, Goal(max_drop=1.0))
    assert all(torch.equal(v, before[n]) for n, v in quarters[0].state_dict().items())
    assert not quarters[0].training

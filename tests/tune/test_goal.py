"""Goals, budgets and fronts."""

import pytest

from pennyweight.errors import InputError
from pennyweight.tune.goal import Clock, Goal, Trial, pareto, seconds_of_budget, summary_of


def trial(drop, ms, size=100):
    return Trial("mixed", "x", 90 - drop, drop, ms, 1.0, size, 0.0, 1.0)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("10 min", 600), ("90s", 90), ("1.5 h", 5400), (30, 30), ("45", 45), (None, float("inf"))],
)
def test_budgets(text, seconds):
    assert seconds_of_budget(text) == seconds


@pytest.mark.parametrize("text", ["soon", "0 s", -1, "10 parsecs", "1.2.3 s"])
def test_budgets_that_are_none(text):
    with pytest.raises((InputError, ValueError)):
        seconds_of_budget(text)


def test_a_clock_runs_down():
    clock = Clock(0.5)
    assert clock.allows(0.1)
    assert not clock.allows(1)


@pytest.mark.parametrize("bad", [{"minimize": "latancy"}, {"max_drop": -1}, {"limit_size": 0}])
def test_goals_that_mean_nothing(bad):
    with pytest.raises(InputError):
        Goal(**bad)


def test_all_promises_count():
    goal = Goal(max_drop=0.5, limit_size=150, limit_latency=2.0)
    assert goal.met(trial(0.5, 1.0))
    assert not goal.met(trial(0.6, 1.0))
    assert not goal.met(trial(0.1, 3.0))
    assert not goal.met(trial(0.1, 1.0, size=200))
    assert Goal(higher_is_better=False).drop(1.0, 1.2) == pytest.approx(0.2)


def test_the_front_has_no_beaten_trial():
    trials = [trial(0.0, 5.0), trial(0.2, 3.0), trial(0.3, 4.0), trial(1.0, 1.0), trial(1.0, 2.0)]
    front = pareto(trials, Goal())
    assert [(t.drop, t.latency_ms) for t in front] == [(1.0, 1.0), (0.2, 3.0), (0.0, 5.0)]


def test_assignments_are_counted():
    assert summary_of({"a": "int8", "b": "int8", "c": "bf16"}) == "2 int8, 1 bf16"

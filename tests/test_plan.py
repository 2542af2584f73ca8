"""Rules to sites: who decides, what follows, what is tied, what is refused."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pennyweight as pw
from pennyweight.errors import NothingQuantized, SpecError, UnrealisableSite, UnusedRule
from pennyweight.plan import Plan, Rule, Site, make_plan
from pennyweight.spec import QuantSpec

WEIGHT, INPUT = QuantSpec.parse("int8n[1,*]"), QuantSpec.parse("uint8[*]+z")
STATIC = Rule(weight=WEIGHT, input=INPUT)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = F.relu(self.stem(x))
        y = self.b(F.relu(self.a(x)))
        x = F.relu(x + y)
        return self.head(x.mean((2, 3)))


class Joined(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.last = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(8, 2, 1)
        self.other = nn.Conv2d(4, 2, 1)

    def forward(self, x):
        a, b = F.relu(self.a(x)), F.relu(self.b(x))
        return self.last(torch.cat([a, b], 1)) + self.other(F.max_pool2d(a, 3, 1, 1))


X = torch.randn(2, 4, 8, 8)


def plan_of(model: nn.Module, *rules: Rule, x=X) -> Plan:
    return make_plan(pw.record(model.eval(), x), rules)


def test_the_first_rule_decides():
    plan = plan_of(Residual(), Rule("a", keep="float32"), Rule("b", weight=WEIGHT), STATIC)
    assert "a" not in plan.layers
    assert "kept in float32" in plan.kept["a"]
    assert plan["b"].inputs == {}
    assert plan["stem"].inputs == {0: INPUT}


def test_globs_cross_dots_and_types_narrow():
    assert Rule("layer*.conv?").matches("layer1.0.conv2", "Conv2d")
    assert not Rule("layer*.conv?", types=("Linear",)).matches("layer1.0.conv2", "Conv2d")
    assert not Rule("conv").matches("conv1", "Conv2d")


def test_fitting_rules_leave_what_their_blocks_do_not_divide():
    grouped = Rule("*", weight=QuantSpec.parse("int4[32]"), fitting=True)
    assert grouped.matches("a", "Linear", [(8, 64)])
    assert not grouped.matches("a", "Linear", [(8, 65)])
    model = nn.Sequential(nn.Linear(64, 48), nn.Linear(48, 5))
    graph = pw.record(model, torch.randn(2, 64))
    shapes = {"0": {"weight": (48, 64)}, "1": {"weight": (5, 48)}}
    plan = make_plan(graph, [grouped, Rule(weight=WEIGHT)], shapes)
    assert [str(plan[n].weight) for n in ("0", "1")] == ["int4[32]", "int8n[1,*]"]
    with pytest.raises(SpecError, match="1:weight"):
        make_plan(graph, [Rule(weight=QuantSpec.parse("int4[32]"))], shapes)


def test_a_rule_that_matches_nothing_names_the_nearest():
    with pytest.raises(UnusedRule, match="stem"):
        plan_of(Residual(), Rule("stemm", weight=WEIGHT), STATIC)
    plan_of(Residual(), Rule("stemm", weight=WEIGHT, optional=True), STATIC)


def test_nothing_to_quantize():
    with pytest.raises(NothingQuantized, match="stem"):
        plan_of(Residual(), Rule(keep="float32"))


def test_what_cannot_be_had():
    with pytest.raises(UnrealisableSite, match="one scale per tensor"):
        plan_of(Residual(), Rule(weight=WEIGHT, input=QuantSpec.parse("uint8[1,*]+z")))
    with pytest.raises(UnrealisableSite, match="the weight is not"):
        plan_of(Residual(), Rule(input=INPUT))


@pytest.mark.parametrize("text", ["uint4[1,*]+z", "uint8[1,*]", "int8n[*]+z", "uint8[32]+z", "uint8[2,*]+z"])
def test_what_cannot_be_ranged_at_run_time(text):
    with pytest.raises(UnrealisableSite, match=r"a scale for the tensor or each token.*uint8\[1,\*\]\+z"):
        plan_of(Residual(), Rule("head", weight=WEIGHT, input=QuantSpec.parse(text), dynamic=True))
    per_token = QuantSpec.parse("uint8[1,*]+z")
    with pytest.raises(UnrealisableSite, match=r"Use uint8\[\*\]\+z"):
        plan_of(Residual(), Rule("stem", weight=WEIGHT, input=per_token, dynamic=True))


def test_operations_follow_where_their_result_flows():
    plan = plan_of(Residual(), STATIC)
    assert ":add/0" in plan.layers
    assert ":mean/0" in plan.layers
    floats = plan_of(Residual(), Rule("head", keep="float32"), Rule("b", keep="float32"), STATIC)
    assert ":add/0" not in floats.layers
    assert "not read by an integer operation" in floats.kept[":add/0"]


def test_the_fresh_summand_stays_in_its_accumulator():
    plan = plan_of(Residual(), STATIC)
    assert list(plan[":add/0"].inputs) == [
        0
    ]  # the shortcut is codes; b's product is added before it is rounded


def test_sites_that_see_the_same_values_are_tied():
    plan = plan_of(Joined(), STATIC)
    ties = [{str(s) for s in group} for group in plan.ties]
    assert {"a:input", "b:input"} in ties
    shared = next(group for group in ties if "last:input" in group)
    assert any(
        "max_pool2d" in s or s == "other:input" for s in shared
    )  # a, before and after its pool, is in the joint


def test_sites_as_text():
    plan = plan_of(Residual(), STATIC)
    for site in plan.sites():
        assert Site.parse(str(site)) == site
    assert plan.sites()[Site("stem", "weight")] == WEIGHT
    assert plan.sites()[Site("", "add/0:0")] == INPUT


def test_dynamic_layers_leave_the_rest_in_float():
    plan = plan_of(Residual(), Rule(weight=WEIGHT, input=INPUT, dynamic=True))
    assert plan["stem"].dynamic
    assert plan.ties == ()
    assert not [n for n in plan.layers if ":" in n]

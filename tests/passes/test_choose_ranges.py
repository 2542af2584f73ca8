"""Ranges chosen by what each does to the result: as trying all of them says, and not what a site's own error says."""

import pytest
import torch
from torch import nn

import pennyweight as pw
from pennyweight.errors import EmptyCalibration, RecipeError
from pennyweight.graph.record import call
from pennyweight.passes.calibrate import Calibrate, quantizers
from pennyweight.passes.choose_ranges import CANDIDATES
from pennyweight.recipe import Recipe
from pennyweight.reconstruction.capture import floating
from pennyweight.reconstruction.results import divergence

RULES = """
[[rules]]
weight = "int8n[1,*]"
input = "uint8[*]+z"
"""
CHOSEN = RULES + '\n[[passes]]\npass = "choose_ranges"\n\n[[passes]]\npass = "solve"\n'


class Residual(nn.Module):
    """Branches that meet in a sum and in a concatenation: sites that share scales."""

    def __init__(self):
        super().__init__()
        self.first, self.left, self.right = (nn.Conv2d(i, 6, 3, padding=1) for i in (3, 6, 6))
        self.last = nn.Linear(12, 5)

    def forward(self, x):
        x = self.first(x).relu()
        left = (self.left(x) + x).relu()
        right = self.right(left).relu()
        return self.last(torch.cat([left, right], 1).mean((2, 3)))


def residual():
    torch.manual_seed(0)
    model = Residual().eval()
    with torch.no_grad():
        model.last.weight *= 30  # classes that differ
    x = torch.randn(96, 3, 8, 8) * torch.rand(96, 1, 1, 1).exp()
    return model, [x[:40], x[40:80], x[80:]]


def trial(model, batches, options, site, group):
    """The divergence with one group rounded in the range of one candidate, by a run of the whole network."""
    recipe = RULES + "\n" + Recipe(passes=(Calibrate(**options),)).to_text().partition("\n")[2]
    prepared = pw.prepare(model, batches[0], Recipe.parse(recipe + '\n[[passes]]\npass = "solve"\n'))
    pw.calibrate(prepared, batches, progress=False)
    total = 0.0
    with floating(prepared), torch.no_grad():
        found = quantizers(prepared)
        for batch in batches:
            wanted = call(prepared, batch)
            for name in group:
                found[name].active = True
            total += float(divergence(wanted, call(prepared, batch))) * len(batch)
            for name in group:
                found[name].active = False
    return total, float(found[site].scale)


def test_the_best_of_all_candidates_is_taken():
    model, batches = residual()
    prepared = pw.prepare(model, batches[0], Recipe.parse(CHOSEN))
    pw.calibrate(prepared, batches, progress=False)
    st = pw.state(prepared)
    ties = [[str(s) for s in group] for group in st.plan.ties]
    assert any(len(group) > 1 for group in ties)
    found, rules = quantizers(prepared), set()
    for event in st.journal.of("range"):
        group = next((g for g in ties if event.site in g), [event.site])
        tried = [trial(model, batches, dict(c), event.site, group) for c in CANDIDATES]
        best = min(tried)[0]
        mine = [loss for loss, scale in tried if scale == float(found[event.site].scale)]
        assert mine
        assert min(mine) <= best * 1.05 + 1e-12  # ranges that differ by less than a hundredth are tried once
        rules.add(event.data["rule"])
    assert len(rules) > 1


def test_large_values_that_no_reader_heeds_are_clipped():
    """A rare, large value decides the class of one network and is weighted with 0 in another."""
    torch.manual_seed(0)
    x = torch.rand(256, 4)
    x[::16, 0] = 40.0
    scales = {}
    for heeded in (True, False):
        model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)).eval()
        with torch.no_grad():
            model[0].weight.copy_(torch.eye(4))
            model[0].bias.zero_()
            model[2].weight[:, 0] = torch.tensor([0.5, -0.5, 0.0]) if heeded else 0.0
            model[2].weight[:, 1:] *= 3
        candidates = 'candidates = [{ range = "minmax" }, { range = "percentile", options = { p = 0.98 } }]'
        recipe = CHOSEN.replace('"choose_ranges"\n', f'"choose_ranges"\n{candidates}\n')
        prepared = pw.prepare(model, x[:8], Recipe.parse(recipe))
        pw.calibrate(prepared, [x], progress=False)
        rules = {e.site: e.data["rule"] for e in pw.journal(prepared).of("range")}
        assert rules["2:input"] == ("minmax" if heeded else "percentile")
        scales[heeded] = float(quantizers(prepared)["2:input"].scale)
    assert scales[True] > 10 * scales[False]


def test_bad_input():
    for candidates, what in (("[]", "no candidate"), ('[{ rule = "mse" }]', "rule")):
        with pytest.raises(RecipeError, match=what):
            Recipe.parse(f'[[passes]]\npass = "choose_ranges"\ncandidates = {candidates}\n')
    model, batches = residual()
    with pytest.raises(EmptyCalibration):
        pw.calibrate(pw.prepare(model, batches[0], Recipe.parse(CHOSEN)), [], progress=False)


def test_the_text_says_everything():
    recipe = Recipe.parse(CHOSEN)
    assert Recipe.parse(recipe.to_text()) == recipe

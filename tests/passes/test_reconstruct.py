"""Learned roundings come closer than nearest ones, are reproducible, can be resumed, and leave the user's model alone."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pennyweight as pw
from pennyweight.recipe import Recipe

RULES = """
[[rules]]
weight = "int3n[1,*]"
input = "uint8[*]+z"
optional = true

[[passes]]
pass = "fold_batch_norm"

[[passes]]
pass = "calibrate"
"""
NEAREST = RULES + '\n[[passes]]\npass = "solve"\nrange = "mse"\n'
METHODS = ["adaround", "adaquant", "brecq", "qdrop"]


def learned(name, **options):
    options = {"iterations": 60, **options}
    lines = [f"{k} = {str(v).lower() if isinstance(v, bool) else repr(v)}" for k, v in options.items()]
    return RULES + f'\n[[passes]]\npass = "{name}"\n' + "\n".join(lines) + "\n"


class Net(nn.Module):
    """Stem, a residual block whose sum is a site, a head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.block, self.head = Block(), nn.Linear(8, 5)

    def forward(self, x):
        x = self.block(F.relu(self.norm(self.stem(x))))
        return self.head(x.mean((2, 3)))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        return F.relu(x + self.b(F.relu(self.a(x))))


def data():
    x = torch.randn(96, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return list(x[:64].split(16)), x[64:]


def drift(model, result, x):
    with torch.no_grad():
        return float((result(x) - model(x)).norm() / model(x).norm())


@pytest.mark.parametrize("name", METHODS)
def test_held_out_results_come_closer(name):
    model, (batches, x) = Net().eval(), data()
    before = copy.deepcopy(model.state_dict())
    nearest = pw.quantize(model, batches, Recipe.parse(NEAREST), progress=False)
    result = pw.quantize(model, batches, Recipe.parse(learned(name, iterations=150)), progress=False)
    assert drift(model, result, x) < 0.8 * drift(model, nearest, x)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    rows = pw.journal(result).rows("reconstruct")
    assert [r["site"] for r in rows] == (
        ["stem", "block.a", "block.b", "head"] if name == "adaround" else ["stem", "block", "head"]
    )
    assert all(r["after"] <= r["before"] for r in rows)


@pytest.mark.parametrize(
    "options",
    [
        {"rounding": "signs"},
        {"biases": False},
        {"units": "block", "steps": True, "drop": 0.3},
        {"units": "network", "rounding": "free", "steps": True},
    ],
)
def test_options(options):
    model, (batches, x) = Net().eval(), data()
    nearest = pw.quantize(model, batches, Recipe.parse(NEAREST), progress=False)
    result = pw.quantize(model, batches, Recipe.parse(learned("reconstruct", **options)), progress=False)
    assert drift(model, result, x) < drift(model, nearest, x)


def same(a, b):
    return all(
        torch.equal(u, v) for u, v in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


def test_the_seed_decides():
    model, (batches, _) = Net().eval(), data()
    recipe = Recipe.parse(learned("qdrop"))
    torch.manual_seed(5)
    first = pw.quantize(model, batches, recipe, progress=False)
    state = torch.get_rng_state()
    torch.manual_seed(6)
    assert same(first, pw.quantize(model, batches, recipe, progress=False))
    assert not same(first, pw.quantize(model, batches, recipe, seed=1, progress=False))
    torch.manual_seed(5)
    assert torch.equal(torch.get_rng_state(), state)  # nothing of the global stream was used


@pytest.mark.parametrize("name", METHODS)
def test_it_goes_on_where_it_stopped(name, tmp_path, monkeypatch):
    model, (batches, _) = Net().eval(), data()
    recipe = Recipe.parse(learned(name))
    whole = pw.quantize(model, batches, recipe, progress=False)
    from pennyweight.passes import reconstruct

    real, calls = reconstruct.reconstruct, []

    def stops(block, *rest):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(block.unit.path)
        return real(block, *rest)

    monkeypatch.setattr(reconstruct, "reconstruct", stops)
    with pytest.raises(KeyboardInterrupt):
        pw.quantize(model, batches, recipe, progress=False, checkpoint=tmp_path)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2
    calls.append("again")
    resumed = pw.quantize(model, batches, recipe, progress=False, checkpoint=tmp_path)
    assert same(whole, resumed)
    files = [tmp_path.parent / f"{name}.safetensors" for name in ("whole", "resumed")]
    for path, result in zip(files, (whole, resumed), strict=True):
        pw.save(result, path)
    assert files[0].read_bytes() == files[1].read_bytes()
    assert calls == [*calls[:2], "again", *calls[3:]]
    assert not set(calls[:2]) & set(calls[3:])  # what was found is not searched again
    other = pw.quantize(model, [b * 2 for b in batches], recipe, progress=False, checkpoint=tmp_path)
    assert not same(whole, other)  # other data, another folder
    assert len(list(tmp_path.iterdir())) == 2


def test_sentences_of_any_length():
    """Batches that cannot be stacked are drawn as they came."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    batches = [torch.randn(4, n, 8) for n in (3, 5, 7, 9)]
    result = pw.quantize(model, batches, Recipe.parse(learned("adaround")), progress=False)
    nearest = pw.quantize(model, batches, Recipe.parse(NEAREST), progress=False)
    x = torch.randn(8, 6, 8)
    assert drift(model, result, x) < drift(model, nearest, x)


def test_programs_are_the_models(tmp_path):
    model, (batches, x) = Net().eval(), data()
    result = pw.quantize(model, batches, Recipe.parse(learned("qdrop")), progress=False)
    program = pw.lower(result, x)
    assert pw.difference(result, program, x)["sqnr_db"] > 60
    pw.save(result, tmp_path / "m.safetensors")
    again = pw.load(tmp_path / "m.safetensors", model, x)
    with torch.no_grad():
        assert torch.equal(result(x), again(x))


def test_refusals():
    for option in ("start", "units", "rounding"):
        with pytest.raises(pw.errors.RecipeError, match=f"{option} = 'every'"):
            Recipe.parse(learned("reconstruct", **{option: "every"}))
    with pytest.raises(pw.errors.RecipeError, match="drop"):
        Recipe.parse(learned("reconstruct", drop=1.5))
    weights = Recipe.parse('[[rules]]\nweight = "int4[1,*]"\n[[passes]]\npass = "adaround"\n')
    with pytest.raises(pw.errors.EmptyCalibration):
        pw.quantize(nn.Linear(4, 4), None, weights, example=torch.randn(2, 4), progress=False)


def test_what_is_solved_is_learned_on():
    """The whole network, from GPTQ's codes and measured biases: never further from float than these."""
    model, (batches, x) = Net().eval(), data()
    found = '\n[[passes]]\npass = "solve"\nsolver = "gptq"\n\n[[passes]]\npass = "correct_bias"\nsource = "outputs"\n'
    further = learned(
        "reconstruct", start="solved", units="network", rounding="free", steps=True, iterations=150
    )
    further = further.replace(RULES, RULES + found)
    start = pw.quantize(model, batches, Recipe.parse(RULES + found), progress=False)
    result = pw.quantize(model, batches, Recipe.parse(further), progress=False)
    (row,) = pw.journal(result).rows("reconstruct")
    assert row["layers"] == 4
    assert row["after"] < 0.9 * row["before"]
    assert drift(model, result, x) < drift(model, start, x)

"""Methods and what goes before them: each better than what it improves on, and function-preserving where it says so."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file

from pennyweight.errors import InputError
from pennyweight.llm.directory import Directory
from pennyweight.llm.load import load, logits
from pennyweight.llm.methods import Problem, methods
from pennyweight.llm.quantize import quantize
from pennyweight.llm.request import Request
from pennyweight.llm.rotate import cosines, rotation
from pennyweight.llm.skeleton import Skeleton
from pennyweight.llm.stream import enter
from pennyweight.llm.targets import readers
from pennyweight.ranges.minmax import MinMax
from pennyweight.ranges.mse import MSE
from pennyweight.solvers import input_solvers, solvers
from pennyweight.solvers.retarget import retarget
from pennyweight.spec import QuantSpec

SPECS = ["int3[16]", "uint3[16]+z", "uint3[16]+zf"]


def lost(model, ids, want):
    return float((logits(model, ids) - want).pow(2).mean() / want.var())


@pytest.fixture(scope="module")
def want(llama, ids):
    return logits(load(llama), ids)


@pytest.fixture
def weight():
    made = torch.Generator().manual_seed(0)
    w = torch.randn(24, 64, generator=made)
    return torch.where(torch.rand(24, 64, generator=made) < 0.03, w * 5, w)


@pytest.fixture
def gram():
    made = torch.Generator().manual_seed(1)
    x = torch.randn(400, 64, generator=made) @ torch.randn(64, 64, generator=made) * torch.logspace(-1, 1, 64)
    return x.T @ x / 400


@pytest.mark.parametrize("text", SPECS)
def test_hqq_lowers_its_own_objective(weight, text):
    spec = QuantSpec.parse(text)
    start = solvers["rtn"](weight, spec, MinMax())
    found = solvers["hqq"](weight, spec, MinMax())
    before, after = (((weight - q.dequantize()).abs() ** 0.7).sum() for q in (start, found))
    assert after < 0.99 * before
    assert found.spec == spec
    assert found.zero is None or torch.equal(found.zero, found.zero.round()) == (spec.zero == "int")


@pytest.mark.parametrize("text", ["int3[16]", "uint3[16]+z", "int4n[1,*]"])
def test_weighted_ranges_lower_the_weighted_error(weight, gram, text):
    spec, h = QuantSpec.parse(text), gram.diagonal()
    plain = solvers["rtn"](weight, spec, MSE())
    found = input_solvers["weighted"](weight, spec, MSE(), gram)
    before, after = ((h * (weight - q.dequantize()) ** 2).sum() for q in (plain, found))
    assert after < 0.98 * before


@pytest.mark.parametrize("text", ["int3[16]", "uint3[16]+z", "int3[1,*]"])
def test_clipping_lowers_the_error_of_each_group(weight, gram, text):
    spec = QuantSpec.parse(text)
    found = input_solvers["clip"](weight, spec, MinMax(), gram)
    plain = solvers["rtn"](weight, spec, MinMax())
    size = 64 // spec.scale_shape((24, 64))[1]
    for g in range(64 // size):
        part = slice(g * size, (g + 1) * size)
        h = gram[part, part]
        errors = [
            torch.einsum("oi,ij,oj->o", d, h, d)
            for d in ((weight - q.dequantize())[:, part] for q in (found, plain))
        ]
        assert bool((errors[0] <= errors[1] * 1.0001).all())
        assert float(errors[0].sum()) < 0.97 * float(errors[1].sum())


def test_retargeting_is_least_squares(gram):
    made = torch.Generator().manual_seed(2)
    x, float_x = torch.randn(500, 16, generator=made), torch.randn(500, 16, generator=made)
    float_x = x + 0.2 * float_x
    w = torch.randn(8, 16, generator=made)
    found = retarget(w, x.T @ x / 500, float_x.T @ x / 500, damp=0.0)
    exact = torch.linalg.lstsq(x, float_x @ w.T).solution.T
    torch.testing.assert_close(found, exact, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        retarget(w, x.T @ x / 500, float_x.T @ x / 500, damp=1e9), w, atol=1e-4, rtol=1e-4
    )
    grams = [torch.stack([a.T @ b, b.T @ b]) / 500 for a, b in ((x, x), (float_x, x))]
    both = retarget(w.repeat(2, 1), *grams)
    for part, gram, cross in zip(both.split(8), *grams, strict=True):
        torch.testing.assert_close(part, retarget(w, gram, cross))


@pytest.mark.parametrize(
    ("method", "options", "factor"),
    [("hqq", {}, 1.1), ("weighted", {}, 1.1), ("awq", {}, 0.9), ("autoround", {"steps": 60}, 0.6),
     ("gptq", {"retarget": True}, 0.6), ("gptq", {"rotate": True}, 0.8), ("gptq", {"awq": True}, 0.7),
     ("gptq", {"sequential": False}, 0.6)],
)  # fmt: skip
def test_methods_improve_on_rounding(llama, ids, want, tmp_path, method, options, factor):
    quantize(llama, tmp_path / "plain", Request("w3a16"))
    quantize(llama, tmp_path / "out", Request("w3a16", method=method, **options), ids)
    assert lost(load(tmp_path / "out"), ids, want) < factor * lost(load(tmp_path / "plain"), ids, want)


@pytest.mark.parametrize(("group", "share"), [(0, 1.0), (32, 0.9)])
def test_gptq_of_two_bits_takes_the_ranges_of_least_output_error(weight, gram, group, share):
    from pennyweight.llm.methods import relative_loss, searched
    from pennyweight.llm.schemes import scheme_of

    spec = scheme_of("w2a16", group).weight
    fixed = input_solvers["gptq"](weight, spec, searched(spec), gram)
    found = methods["gptq"].solve(Problem(weight, spec, gram))
    assert relative_loss(weight, found, gram) <= share * relative_loss(weight, fixed, gram)


@pytest.mark.parametrize(
    ("scheme", "options", "factor"),
    [
        ("w3a16", {}, 0.9),
        ("w2a16", {"group": 32, "asymmetric": True}, 0.9),
        ("w8a8-static", {"retarget": True}, 1.02),
    ],
)
def test_autoround_goes_on_from_gptq(llama, ids, want, tmp_path, scheme, options, factor):
    quantize(llama, tmp_path / "start", Request(scheme, method="gptq", **options), ids)
    said = []
    request = Request(scheme, method="autoround", steps=40, **options)
    quantize(llama, tmp_path / "out", request, ids, report=said.append)
    assert lost(load(tmp_path / "out"), ids, want) < factor * lost(load(tmp_path / "start"), ids, want)
    trained = [e for e in said if e["what"] == "trained"]
    assert len(trained) == 3
    assert all(e["loss"] <= e["before"] for e in trained)
    layers = [e["site"] for e in said if e["what"] == "layer"]
    assert len(layers) == len(set(layers))


def test_how_far_autoround_goes_is_said_by_its_rate(llama, ids, tmp_path):
    made = {}
    for name, request in (
        ("gptq", Request("w3a16", method="gptq")),
        ("small", Request("w3a16", method="autoround", steps=8, rate=1e-6)),
        ("large", Request("w3a16", method="autoround", steps=8, rate=0.3)),
    ):
        quantize(llama, tmp_path / name, request, ids)
        made[name] = {k: t for f in (tmp_path / name).glob("*.safetensors") for k, t in load_file(f).items()}
    moved = {
        name: sum(int((made[name][k] != made["gptq"][k]).sum()) for k in made["gptq"])
        for name in ("small", "large")
    }
    assert moved["small"] < 10  # what was a tie
    assert moved["large"] > 1000


def test_autoround_rounds_activations_while_it_trains(llama, ids, want, tmp_path):
    quantize(llama, tmp_path / "plain", Request("w3a8"))
    quantize(llama, tmp_path / "out", Request("w3a8", method="autoround", steps=40), ids)
    assert lost(load(tmp_path / "out"), ids, want) < 0.7 * lost(load(tmp_path / "plain"), ids, want)


@pytest.mark.parametrize("n", [1, 2, 12, 48, 64, 96])
def test_rotations_are_orthogonal_and_spread(n):
    q = rotation(n, 0)
    torch.testing.assert_close(q @ q.T, torch.eye(n, dtype=q.dtype), atol=1e-12, rtol=0)
    assert float(q.abs().max()) <= 2**0.5 / n**0.5 + 1e-9
    c = cosines(n)
    torch.testing.assert_close(c @ c.T, torch.eye(n, dtype=c.dtype), atol=1e-12, rtol=0)


@pytest.fixture
def outliers(llama, tmp_path):
    """The model with norm channels 50 times as large and the columns behind them as much smaller: the same function."""
    import shutil

    folder = shutil.copytree(llama, tmp_path / "outliers")
    tensors = load_file(folder / "model.safetensors")
    for i in range(3):
        for norm, layers in (
            ("input_layernorm", ("q", "k", "v")),
            ("post_attention_layernorm", ("gate", "up")),
        ):
            part = "self_attn" if norm[0] == "i" else "mlp"
            for channel in (5, 40):
                tensors[f"model.layers.{i}.{norm}.weight"][channel] *= 50
                for r in layers:
                    tensors[f"model.layers.{i}.{part}.{r}_proj.weight"][:, channel] /= 50
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_smoothing_and_rotation_restore_what_outliers_cost(llama, outliers, ids, want, tmp_path):
    assert lost(load(outliers), ids, want) < 1e-9
    found = {}
    for name, options in (("plain", {}), ("smooth", {"smooth": 0.5}), ("rotate", {"rotate": True})):
        quantize(outliers, tmp_path / name, Request("w8a8-static", **options), ids)
        found[name] = lost(load(tmp_path / name), ids, want)
    assert found["plain"] > 0.05
    assert found["smooth"] < 0.01 and found["rotate"] < 0.01
    quantize(llama, tmp_path / "without", Request("w8a8-static"), ids)
    assert found["smooth"] < 2 * lost(load(tmp_path / "without"), ids, want)


def test_a_calibrated_range_is_that_of_least_squared_error():
    from pennyweight.llm.block import Group, Streams, input_params, observe, round_tokens
    from pennyweight.llm.schemes import scheme_of

    scheme, group, block = scheme_of("w8a8-static"), Group(["layer"]), torch.nn.Module()
    block.layer = torch.nn.Linear(64, 8)
    x = torch.randn(8, 512, 64, generator=torch.Generator().manual_seed(0))
    streams = Streams(lambda module, hidden: module.layer(hidden), list(x.split(2)))
    observe(block, streams, [group], {"layer": scheme}, False)
    low, high = torch.aminmax(x)
    extremes = torch.stack([(high - low) / 255, torch.round(-low * 255 / (high - low))])
    before, after = (
        (round_tokens(x, scheme, p) - x).pow(2).mean() for p in (extremes, input_params(group, scheme))
    )
    assert after < 0.95 * before
    group.scaled(torch.ones(64))
    assert (
        input_params(group, scheme) is None
    )  # a histogram of all inputs together cannot follow: to be observed anew


def test_observing_ends_at_the_last_layer_looked_at():
    from pennyweight.llm.block import Group, Streams, observe
    from pennyweight.llm.schemes import scheme_of

    ran = []

    class Tail(torch.nn.Module):
        def forward(self, x):
            ran.append(len(x))
            return x

    block = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Linear(16, 16), Tail())
    x = torch.randn(8, 4, 16, generator=torch.Generator().manual_seed(0))
    schemes = dict.fromkeys("012", scheme_of("w8a8"))
    batches = list(x.split(2))

    def moments(streams, names, calls=None):
        groups = [Group([n]) for n in names]
        ran.clear()
        observe(block, streams, groups, schemes, True)
        assert ran == [2] * (calls or len(ran))
        return [g.gram for g in groups]

    def go(module, hidden):
        return module(hidden)

    apart = [moments(Streams(go, batches), [n])[0] for n in "01"]
    assert ran == [2]
    floats = Streams(go, batches, [2 * b for b in batches], copy.deepcopy(block))
    both = moments(floats, ["0", "1"], 2)  # of each block one run to its end
    assert all(torch.equal(a, b) for a, b in zip(apart, both, strict=True))

    def twice(module, hidden):  # a layer that runs again is counted again: nothing is cut short
        return module(module(hidden))

    groups = [Group(["0"])]
    ran.clear()
    observe(block, Streams(twice, batches), groups, schemes, False)
    assert ran == [2] * 8
    assert groups[0].tokens == 64


@pytest.mark.parametrize("tied", [False, True])
def test_rotation_in_float_changes_nothing(ids, tmp_path, tied):
    from tests.llm.conftest import make_llama

    from pennyweight.llm.methods import searched
    from pennyweight.llm.request import Run
    from pennyweight.llm.rotate import rotate_block, turned
    from pennyweight.llm.schemes import scheme_of
    from pennyweight.llm.steps import outer

    make_llama(tmp_path / "tiny", tie_word_embeddings=tied)
    base = load(tmp_path / "tiny")
    want = logits(base, ids)
    skeleton = Skeleton(Directory(tmp_path / "tiny"))
    q = rotation(64, 3)
    run = Run(skeleton.directory, skeleton, Request(), scheme_of("w8a8"), methods["rtn"], lambda e: None, q)
    model = load(tmp_path / "tiny")
    if tied:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    hidden, calls = enter(skeleton, ids)
    for i in range(3):
        block = model.model.layers[i]
        following = calls.run(block, i, hidden)
        rotate_block(block, lambda m, x, i=i: calls.run(m, i, x), hidden[:2], q)
        assert bool((block.input_layernorm.weight == 1).all())
        hidden = following
    for name, tensor in outer(run).floats.items():
        model.get_parameter(name).data.copy_(tensor)
    assert bool((model.model.norm.weight == 1).all())
    with torch.no_grad():
        got = logits(model, ids)
    assert float((got - want).abs().max()) < 1e-4 * float(want.abs().max())
    assert not torch.allclose(model.model.embed_tokens.weight, base.model.embed_tokens.weight, atol=1e-2)
    assert searched(QuantSpec.parse("int4[32]")).steps == 60
    assert turned(hidden, q).shape == hidden.shape


def test_scales_go_into_norms_and_the_rows_before(llama, ids, tmp_path):
    said = []
    quantize(llama, tmp_path / "out", Request("w4a16", method="awq"), ids, said.append)
    absorbed = [e["absorbed"] for e in said if e["what"] == "scaled"]
    assert absorbed[0] == {
        "self_attn.k_proj": "input_layernorm", "mlp.gate_proj": "post_attention_layernorm",
        "mlp.down_proj": "mlp.up_proj",
    }  # fmt: skip
    assert len(absorbed) == 3


def test_options_that_do_not_go_together_are_refused(llama, ids, tmp_path):
    for request in (
        Request("w4a16", retarget=True),
        Request("w4a16", smooth=1.5),
        Request("nf4", group=32, method="autoround"),
        Request("w4a16", method="gptq", rate=0.01),
    ):
        with pytest.raises(InputError):
            quantize(llama, tmp_path / "out", request, ids)
    with pytest.raises(InputError, match="no calibration text"):
        quantize(llama, tmp_path / "out", Request("w4a16", awq=True))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("tied", [False, True])
def test_the_head_is_solved_on_the_last_hidden_states(ids, tmp_path, tied):
    from tests.llm.conftest import make_llama

    make_llama(tmp_path / "tiny", tie_word_embeddings=tied)
    base = load(tmp_path / "tiny")
    want = logits(base, ids)
    found = {}
    for method in ("searched", "gptq"):
        request = Request("w8a16", head="w3a16", method=method)
        quantize(tmp_path / "tiny", tmp_path / method, request, ids)
        found[method] = lost(load(tmp_path / method), ids, want)
    assert found["gptq"] < 0.8 * found["searched"]
    seen = []
    base.lm_head.register_forward_pre_hook(lambda m, args: seen.append(args[0].flatten(0, 1)))
    logits(base, ids)
    gram = seen[0].T @ seen[0] / len(seen[0])
    q = methods["gptq"].solve(Problem(base.lm_head.weight.detach(), QuantSpec.parse("int3[32]^fp16"), gram))
    same = load(tmp_path / "gptq").lm_head
    solved = readers["pennyweight"](Directory(tmp_path / "gptq"))[0]["lm_head"].weight
    assert type(same).__name__ == "IntegerLinear"
    assert float((solved.codes == q.codes).float().mean()) > 0.9  # behind blocks of 8 bits instead of floats


def test_a_killed_run_goes_on_to_the_same_head(llama, ids, tmp_path, monkeypatch):
    from pennyweight.llm import quantize as module

    request = Request("w4a16", head="w4a16", method="gptq")
    quantize(llama, tmp_path / "whole", request, ids)
    with monkeypatch.context() as patch:
        patch.setattr(module, "outer", lambda run, behind: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            quantize(llama, tmp_path / "out", request, ids)
    quantize(llama, tmp_path / "out", request, ids)
    for file in (tmp_path / "whole").iterdir():
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes(), file.name


def test_a_layer_that_no_token_reaches_is_rounded():
    q = methods["gptq"].solve(Problem(torch.randn(8, 32), QuantSpec.parse("int4[32]")))
    assert q.codes.shape == (8, 32)

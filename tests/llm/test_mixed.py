"""Bits chosen layer by layer: damages are what the definition says, choices exact, better than one width for all."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from pennyweight.errors import InputError
from pennyweight.llm.evaluate import perplexity
from pennyweight.llm.load import load, logits
from pennyweight.llm.methods import Problem, methods
from pennyweight.llm.mixed import damages, to_bits, to_perplexity, widths
from pennyweight.llm.quantize import quantize
from pennyweight.llm.request import Request
from pennyweight.llm.schemes import Scheme, bits_of

SILENT = lambda event: None  # noqa: E731


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """A model whose second block hardly matters, and whose last projection matters much."""
    from tests.llm.conftest import make_llama

    folder = tmp_path_factory.mktemp("uneven") / "tiny"
    model = make_llama(folder)
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight *= 0.02
        model.model.layers[1].mlp.down_proj.weight *= 0.02
        model.model.layers[2].mlp.down_proj.weight *= 3.0
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def found(uneven, ids, tmp_path_factory):
    return damages(uneven, Request("w4a16"), ids, tmp_path_factory.mktemp("kept"), SILENT)


def test_damages_are_those_of_the_whole_model_s_gradients(uneven, ids, found):
    model = load(uneven)
    for name in ("model.layers.0.self_attn.v_proj", "model.layers.2.mlp.down_proj"):
        layer, seen = model.get_submodule(name), {}

        def look(m, args, y, seen=seen):
            y.retain_grad() if y.requires_grad else y.requires_grad_()
            seen["x"], seen["y"] = args[0].detach().flatten(0, 1), y

        handle = layer.register_forward_hook(look)
        y = model(ids, use_cache=False).logits
        F.cross_entropy(y[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").backward()
        handle.remove()
        q = methods["searched"].solve(Problem(layer.weight.detach(), found.schemes[3].weight))
        error = seen["x"] @ (layer.weight.detach() - q.dequantize()).T
        want = 0.5 * float((seen["y"].grad.flatten(0, 1).pow(2).mean(0) * error.pow(2).mean(0)).sum())
        assert found.found[name][3] == pytest.approx(want, rel=1e-3)


def test_fewer_bits_do_more_damage_and_the_choice_is_the_best(found):
    assert len(found.found) == 21
    for of_layer in found.found.values():
        assert sorted(of_layer, key=of_layer.get) == [8, 4, 3, 2]
    chosen = found.choose(3.5)
    assert 3.4 < found.average(chosen) <= 3.5
    assert chosen["model.layers.1.mlp.down_proj"] < chosen["model.layers.2.mlp.down_proj"]
    total = sum(found.found[n][b] for n, b in chosen.items())
    room = 3.5 * sum(found.sizes.values())
    names = list(chosen)
    for i in range(200):  # no exchange of two layers' widths is better
        a, b = names[i % 21], names[(i * 7 + 3) % 21]
        other = {**chosen, a: chosen[b], b: chosen[a]}
        if sum(w * found.sizes[n] for n, w in other.items()) <= room:
            assert sum(found.found[n][w] for n, w in other.items()) >= total * (1 - 1e-9)
    assert set(found.choose(8.0).values()) == {8}
    with pytest.raises(InputError, match=r"no choice of widths has 1\.5"):
        found.choose(1.5)


def test_mixed_bits_beat_one_width(uneven, ids, tmp_path):
    want = logits(load(uneven), ids)
    request = to_bits(uneven, tmp_path / "out", Request("w4a8"), 3.0, ids)
    quantize(uneven, tmp_path / "mixed", request, ids)
    quantize(uneven, tmp_path / "even", Request("w3a8", group=32), ids)
    lost = {n: float((logits(load(tmp_path / n), ids) - want).pow(2).mean()) for n in ("mixed", "even")}
    assert lost["mixed"] < 0.7 * lost["even"]
    layers = json.loads((tmp_path / "mixed" / "config.json").read_text())["quantization_config"]["layers"]
    found = {n: bits_of(Scheme.parse(text).weight) for n, (text, _) in layers.items()}
    assert {n: bits_of(Scheme.parse(t).weight) for n, t in request.layers} == found
    assert len(set(found.values())) > 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["even", "mixed"]


def test_methods_take_layers_of_several_widths(uneven, ids, tmp_path):
    want = logits(load(uneven), ids)
    request = to_bits(uneven, tmp_path / "out", Request("w4a16"), 3.0, ids)
    lost = {}
    for name, options in (("plain", {}), ("gptq", {"method": "gptq"}), ("awq", {"method": "awq"})):
        quantize(uneven, tmp_path / name, replace(request, **options), ids)
        lost[name] = float((logits(load(tmp_path / name), ids) - want).pow(2).mean())
    assert lost["gptq"] < 0.8 * lost["plain"] and lost["awq"] < 1.2 * lost["plain"]


def test_as_few_bits_as_a_perplexity_allows(uneven, ids, tmp_path):
    text = ids.flatten()
    base = perplexity(load(uneven), text, 24).value
    losses = []
    request = to_perplexity(
        uneven, tmp_path / "out", Request("w4a16", window=24), 3.0, ids, text,
        lambda e: losses.append((e["bits"], e["loss"])) if e["what"] == "chosen" else None, tries=3,
    )  # fmt: skip
    quantize(uneven, tmp_path / "out", request)
    loss = 100 * (perplexity(load(tmp_path / "out"), text, 24).value / base - 1)
    assert loss <= 3.0
    assert loss in [pytest.approx(v) for _, v in losses]
    assert len(losses) == 4 and min(b for b, v in losses if v <= 3.0) < 7
    with pytest.raises(InputError, match="8 bits lose"):
        to_perplexity(uneven, tmp_path / "no", Request("w4a16", window=24), -50.0, ids, text)


def test_what_cannot_be_mixed_is_refused(uneven, ids, tmp_path):
    from pennyweight.llm.directory import Directory

    assert list(widths(Directory(uneven), Request("w4a16", to="gguf"))) == [4, 8]
    for request in (Request("nf4"), Request("w8a8-static")):
        with pytest.raises(InputError, match="named by bits"):
            to_bits(uneven, tmp_path / "out", request, 3.5, ids)
    with pytest.raises(InputError, match="no block has"):
        quantize(uneven, tmp_path / "out", Request(layers=(("model.layers.9.mlp", "int4[32]^fp16"),)))
    assert not list(tmp_path.iterdir())

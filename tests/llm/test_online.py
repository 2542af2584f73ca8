"""Inputs turned while the model runs: what it restores, that every method and the program know it, what refuses it."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from pennyweight.errors import FormatError, InputError
from pennyweight.llm.load import load, logits
from pennyweight.llm.online import Turned, TurnedLinear, blocks_of
from pennyweight.llm.quantize import quantize
from pennyweight.llm.request import Request
from pennyweight.runtime.decode import load_decoding


def lost(model, ids, want):
    return float((logits(model, ids) - want).pow(2).mean() / want.var())


@pytest.fixture(scope="module")
def want(llama, ids):
    return logits(load(llama), ids)


@pytest.mark.parametrize(("inputs", "size"), [(1, 1), (96, 32), (172, 4), (5632, 512), (4096, 4096)])
def test_a_turned_layer_computes_what_it_did(inputs, size):
    assert blocks_of(inputs) == size
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(inputs, 7), torch.randn(3, inputs)
    turned = TurnedLinear(layer, size)
    seen = []
    turned.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    torch.testing.assert_close(turned(x), layer(x), atol=1e-5, rtol=1e-4)
    if size > 1:
        assert not torch.equal(seen[0], x)  # hooks see what is multiplied
    torch.testing.assert_close(seen[0].norm(dim=1), x.norm(dim=1))
    torch.testing.assert_close(Turned(layer, size)(x), layer(seen[0]))


def test_turned_inputs_restore_what_outliers_inside_of_a_block_cost(llama, ids, want, tmp_path):
    import shutil

    folder = shutil.copytree(llama, tmp_path / "outliers")
    tensors = load_file(folder / "model.safetensors")
    for i in range(3):  # a channel of the gate's product 30 times as large, and read as much smaller
        tensors[f"model.layers.{i}.mlp.up_proj.weight"][7] *= 30
        tensors[f"model.layers.{i}.mlp.down_proj.weight"][:, 7] /= 30
    save_file(tensors, folder / "model.safetensors")
    found = {}
    for name, options in (("plain", {}), ("rotate", {"rotate": True}), ("hadamard", {"hadamard": True}),
                          ("both", {"hadamard": True, "rotate": True})):  # fmt: skip
        quantize(folder, tmp_path / name, Request("w8a8-static", **options), ids)
        found[name] = lost(load(tmp_path / name), ids, want)
    assert found["hadamard"] < 0.5 * found["plain"] and found["both"] < 0.5 * found["rotate"]
    config = json.loads((tmp_path / "both" / "config.json").read_text())["quantization_config"]["layers"]
    assert config["model.layers.0.mlp.down_proj"][2:] == [32]  # of 96 inputs
    assert config["model.layers.0.self_attn.o_proj"][2:] == [64]
    assert all(len(v) == 2 for k, v in config.items() if not k.endswith(("down_proj", "o_proj")))


@pytest.mark.parametrize(
    ("method", "options"), [("rtn", {}), ("gptq", {"retarget": True}), ("autoround", {"steps": 20}),
                            ("awq", {}), ("gptq", {"smooth": 0.5})],
)  # fmt: skip
def test_every_method_takes_turned_inputs(llama, ids, want, tmp_path, method, options):
    given = None if method == "rtn" else ids
    quantize(llama, tmp_path / "out", Request("w4a8", method=method, hadamard=True, **options), given)
    quantize(llama, tmp_path / "plain", Request("w4a8", method=method, **options), given)
    assert lost(load(tmp_path / "out"), ids, want) < 1.3 * lost(load(tmp_path / "plain"), ids, want)


def test_a_program_turns_as_the_module_does(llama, ids, tmp_path):
    from pennyweight.llm.decoder import lower_decoder

    quantize(llama, tmp_path / "out", Request("w8a8", hadamard=True), ids)
    model = load(tmp_path / "out")
    with torch.no_grad():
        wanted = model(ids[:1]).logits[0, -1]
    program = lower_decoder(load(tmp_path / "out"))
    assert sum(op.kind == "hadamard" for op in program) == 6
    quantize(llama, tmp_path / "out.dwt", Request("w8a8", hadamard=True, to="dwt"), ids)
    logits = load_decoding(tmp_path / "out.dwt").step(ids[0].tolist())
    assert float((torch.from_numpy(logits) - wanted).abs().max()) < 0.02 * float(wanted.abs().max())


@pytest.mark.parametrize("to", ["gguf", "gptq", "compressed-tensors"])
def test_files_without_a_place_for_turned_inputs_are_refused(llama, ids, tmp_path, to):
    scheme = {"gguf": "int4[32]^fp16"}.get(to, "w4a16")
    with pytest.raises(InputError, match="no place for inputs that are turned"):
        quantize(llama, tmp_path / "out", Request(scheme, hadamard=True, to=to), ids)


@pytest.mark.parametrize("size", [3, -4, 64, True, "32"])
def test_sizes_that_cannot_be_are_refused(llama, ids, tmp_path, size):
    quantize(llama, tmp_path / "out", Request("w8a8", hadamard=True), ids)
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["layers"]["model.layers.1.mlp.down_proj"][2] = size
    path.write_text(json.dumps(config))
    with pytest.raises(FormatError, match="cannot be turned in blocks"):
        load(tmp_path / "out")

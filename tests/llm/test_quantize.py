"""From a directory to a quantized directory and back: methods, schemes, resuming, what is refused."""

import json
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from pennyweight.errors import FormatError, InputError, NonFinite, RegistryError, SpecError
from pennyweight.llm.evaluate import generate, perplexity
from pennyweight.llm.load import load, logits
from pennyweight.llm.quantize import quantize
from pennyweight.llm.request import Request
from pennyweight.nn.linear import IntegerLinear


def lost(model, ids, want):
    return float((logits(model, ids) - want).pow(2).mean() / want.var())


@pytest.fixture(scope="module")
def want(llama, ids):
    return logits(load(llama), ids)


def test_a_float_directory_computes_what_transformers_computes(llama, ids, want):
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(llama)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, want)


@pytest.mark.parametrize(
    ("scheme", "bound"),
    [("w8a8", 2e-3), ("w8a8-static", 5e-3), ("w4a8", 0.15), ("w4a16", 0.15), ("w3a16", 0.5), ("mxfp4", 0.25),
     ("w4a4", 0.3), ("uint4[32]+z^fp16", 0.15), ("int8n[1,*]", 2e-3)],
)  # fmt: skip
def test_schemes_come_back_from_the_disk(llama, ids, want, tmp_path, scheme, bound):
    quantize(llama, tmp_path / "out", Request(scheme, method="searched"), ids)
    model = load(tmp_path / "out")
    assert 0 < lost(model, ids, want) < bound
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert len(config["quantization_config"]["layers"]) == 21
    assert config["hidden_size"] == 64
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert not list(tmp_path.glob(".out*"))


def test_layers_run_on_the_engine_s_ops(llama, ids, tmp_path):
    quantize(llama, tmp_path / "out", Request("w4a8"))
    kinds = {type(m) for n, m in load(tmp_path / "out").named_modules() if n.endswith("_proj")}
    assert kinds == {IntegerLinear}


def test_gptq_loses_less_than_rounding_and_descent_less_than_gptq(llama, ids, want, tmp_path):
    found = {}
    for method in ("rtn", "searched", "gptq", "descent"):
        quantize(llama, tmp_path / method, Request("w3a16", method=method), ids)
        found[method] = lost(load(tmp_path / method), ids, want)
    assert found["gptq"] < 0.6 * found["searched"] < found["rtn"]
    assert found["descent"] < 0.95 * found["gptq"]


def test_head_and_tables_are_chosen_apart(llama, ids, want, tmp_path):
    request = Request("w8a8", head="w4a8", embeddings="int8n[1,*]")
    quantize(llama, tmp_path / "out", request)
    model = load(tmp_path / "out")
    assert type(model.lm_head) is IntegerLinear and model.lm_head.mode == "grouped"
    assert not isinstance(model.model.embed_tokens, torch.nn.Embedding)
    assert lost(model, ids, want) < 0.1


def test_tied_tables_stay_tied_while_they_are_float(ids, tmp_path):
    from tests.llm.conftest import make_llama

    make_llama(tmp_path / "tied", tie_word_embeddings=True)
    base = logits(load(tmp_path / "tied"), ids)
    quantize(tmp_path / "tied", tmp_path / "out", Request("w8a8"))
    model = load(tmp_path / "out")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert lost(model, ids, base) < 1e-2
    quantize(tmp_path / "tied", tmp_path / "apart", Request("w8a8", head="w8a8"))
    apart = load(tmp_path / "apart")
    assert type(apart.lm_head) is IntegerLinear
    assert lost(apart, ids, base) < 1e-2


def test_generation_with_a_cache_is_generation_without(llama, tmp_path):
    quantize(llama, tmp_path / "out", Request("w4a8"))
    model = load(tmp_path / "out")
    start = torch.tensor([5, 6, 7])
    made = generate(model, start, tokens=6)
    again = start
    for _ in range(6):
        again = torch.cat([again, logits(model, again[None])[0, -1].argmax()[None]])
    assert torch.equal(made, again)


def test_perplexity_is_the_exponent_of_the_mean_loss(llama, ids):
    import math

    model = load(llama)
    y = torch.log_softmax(logits(model, ids), -1)
    mean = -y[:, :-1].gather(-1, ids[:, 1:, None]).mean()
    assert perplexity(model, ids.flatten(), 24).value == pytest.approx(math.exp(mean), rel=1e-5)


PROGRAM = """
import sys, torch
from pennyweight.llm.quantize import quantize
from pennyweight.llm.request import Request
torch.set_num_threads(int(sys.argv[4]))
ids = torch.load(sys.argv[3])
quantize(sys.argv[1], sys.argv[2], Request("w4a8", method="gptq"), ids, lambda e: print(e["what"], e["site"], flush=True))
"""


def files(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_a_killed_run_goes_on_to_the_same_bytes(llama, ids, tmp_path):
    request = Request("w4a8", method="gptq")
    quantize(llama, tmp_path / "whole", request, ids)
    torch.save(ids, tmp_path / "ids.pt")
    command = [sys.executable, "-c", PROGRAM, str(llama), str(tmp_path / "killed"), str(tmp_path / "ids.pt")]
    run = subprocess.Popen([*command, str(torch.get_num_threads())], stdout=subprocess.PIPE, text=True)
    for line in run.stdout:
        if line.strip() == "layer model.layers.1.self_attn.v_proj":
            break
    run.send_signal(signal.SIGKILL)
    run.communicate()
    assert not (tmp_path / "killed").exists()
    assert (tmp_path / ".killed.partial" / "block-00000.safetensors").is_file()
    said = []
    quantize(llama, tmp_path / "killed", request, ids, lambda e: said.append(f"{e['what']} {e['site']}"))
    assert "resumed model.layers.1" in said and not any("layers.0." in s for s in said)
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


def test_another_request_does_not_go_on_with_an_unfinished_run(llama, tmp_path, monkeypatch):
    from pennyweight.llm import quantize as module

    monkeypatch.setattr(module, "outer", lambda run, behind: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        quantize(llama, tmp_path / "out", Request("w4a8"))
    monkeypatch.undo()
    with pytest.raises(InputError, match="other settings"):
        quantize(llama, tmp_path / "out", Request("w8a8"))
    quantize(llama, tmp_path / "out", Request("w4a8"))
    assert (tmp_path / "out").is_dir()


def copy(llama, tmp_path):
    return shutil.copytree(llama, tmp_path / "copy")


def test_bad_directories_are_refused_before_anything_is_written(llama, tmp_path):
    request = Request("w4a8")
    with pytest.raises(InputError, match="no such folder"):
        quantize(tmp_path / "missing", tmp_path / "out", request)
    empty = copy(llama, tmp_path)
    (empty / "model.safetensors").unlink()
    with pytest.raises(FormatError, match="no weights"):
        quantize(empty, tmp_path / "out", request)
    (empty / "model.safetensors").write_bytes(b"\x10" * 100)
    with pytest.raises(FormatError, match="cannot be read"):
        quantize(empty, tmp_path / "out", request)
    (empty / "config.json").write_text("{")
    with pytest.raises(FormatError, match="no JSON"):
        quantize(empty, tmp_path / "out", request)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["copy"]


def test_an_unknown_architecture_is_named(llama, tmp_path):
    folder = copy(llama, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "lama"}))
    with pytest.raises(InputError, match=r"'lama' is unknown.*Did you mean '\w*lama"):
        quantize(folder, tmp_path / "out", Request("w4a8"))


def test_weights_that_do_not_belong_are_named(llama, tmp_path):
    folder = copy(llama, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(NonFinite, match=r"1 of 6144 weights.*layers\.1\.mlp\.up_proj"):
        quantize(folder, tmp_path / "out", Request("w4a8"))
    assert [p.name for p in tmp_path.iterdir()] == [
        "copy"
    ]  # the model must change, so there is nothing to go on with
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = 0.0
    lost = tensors.pop("model.layers.2.mlp.up_proj.weight")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(FormatError, match=r"layers\.2\.mlp\.up_proj\.weight' the first"):
        quantize(folder, tmp_path / "other", Request("w4a8"))
    save_file({**tensors, "model.layers.2.mlp.up_proj.weight": lost[:5]}, folder / "model.safetensors")
    with pytest.raises(FormatError, match=r"does not fit the configuration.*layers\.2"):
        quantize(folder, tmp_path / "third", Request("w4a8"))


@pytest.mark.parametrize(
    ("request_", "error", "words"),
    [
        (Request("w9a8"), InputError, "no scheme 'w9a8'"),
        (Request("w4a8", asymmetric=True), InputError, "no zero point"),
        (Request("w4a8", group=48), SpecError, "layers.0"),
        (Request("w4a8", method="gtpq"), RegistryError, "Did you mean 'gptq'"),
        (Request("w4a8", method="gptq"), InputError, "no calibration text"),
        (Request("w8a8-static"), InputError, "no calibration text"),
        (Request("w4a8", to="gguff"), RegistryError, "gguff"),
    ],
)
def test_bad_requests_are_refused(llama, tmp_path, request_, error, words):
    with pytest.raises(error, match=words):
        quantize(llama, tmp_path / "out", request_)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_noticed_before_the_work(llama, tmp_path, monkeypatch):
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 10**6 - 100, 100))
    begin = time.perf_counter()
    with pytest.raises(InputError, match="GB free"):
        quantize(llama, tmp_path / "out", Request("w4a8"))
    assert time.perf_counter() - begin < 20
    assert not list(tmp_path.iterdir())


def test_the_target_must_not_exist(llama, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="exists already"):
        quantize(llama, tmp_path / "out", Request("w4a8"))

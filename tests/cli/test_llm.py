"""The verbs of language models."""

import json

import pytest

from pennyweight.cli.main import CODES, main

pytest.importorskip("transformers", reason="the extra `llm` is not installed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from tests.llm.conftest import make_llama, make_tokenizer

    path = tmp_path_factory.mktemp("cli") / "tiny"
    make_llama(path, num_hidden_layers=2)
    make_tokenizer(path)
    (path.parent / "text.txt").write_text("the cat sat on the mat and the dog sat on the cat. " * 20)
    return path


def test_a_model_is_quantized_evaluated_and_run(folder, tmp_path, capsys):
    text, out = str(folder.parent / "text.txt"), str(tmp_path / "out")
    command = [
        "llm",
        "quantize",
        str(folder),
        "-o",
        out,
        "--scheme",
        "w4a8",
        "--group",
        "32",
        "--method",
        "gptq",
    ]
    assert (
        main([*command, "--calib", text, "--windows", "8", "--window", "32", "--verify", text, "--json"]) == 0
    )
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert found["bytes"] < 0.6 * found["bytes before"]
    assert [e["what"] for e in found["events"]].count("layer") == 14
    assert "mlp.down_proj loss" in said.err and "2/2 model.layers.1" in said.err
    assert main(["llm", "perplexity", out, "--text", text, "--window", "32", "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["perplexity"] == pytest.approx(found["perplexity"])
    assert again["windows"] == 31 and again["tokens"] == 31 * 31
    assert main(["llm", "generate", out, "--prompt", "the cat", "--tokens", "5", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert len(made["ids"]) == 12 and made["text"].startswith("the cat")


def test_an_estimate_comes_before_the_run(folder, capsys):
    assert main(["llm", "estimate", str(folder), "--scheme", "w4a16", "--method", "gptq", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["blocks"] == 2 and found["bits"] == 4.5
    assert found["states"] == 128 * 512 * 64 * 4


def test_errors_are_one_line(folder, tmp_path, capsys):
    (tmp_path / "short.txt").write_text("short")
    command = [
        "llm",
        "quantize",
        str(folder),
        "-o",
        str(tmp_path / "out"),
        "--calib",
        str(tmp_path / "short.txt"),
    ]
    assert main(command) == CODES["refused"]
    assert "5 tokens, one window needs 512" in capsys.readouterr().err
    assert (
        main(["llm", "perplexity", str(tmp_path), "--text", str(tmp_path / "short.txt")]) == CODES["refused"]
    )
    assert "no config.json" in capsys.readouterr().err

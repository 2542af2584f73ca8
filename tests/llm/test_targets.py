"""Files of others: what they hold is what was solved, as their own readers see it; what they cannot hold is refused."""

import json
import shutil

import numpy as np
import pytest
import torch

from pennyweight.errors import InputError, SpecError
from pennyweight.llm.directory import Directory
from pennyweight.llm.load import load, load_file, logits
from pennyweight.llm.methods import Problem, methods
from pennyweight.llm.quantize import quantize
from pennyweight.llm.request import Request
from pennyweight.llm.targets import readers
from pennyweight.spec import QuantSpec

CASES = [
    ("w4a16", {}), ("w3a16", {}), ("w8a8", {}), ("w4a8", {}), ("w8a8-static", {}), ("w4a16", {"asymmetric": True}),
    ("w4a16", {"head": "w8a16"}), ("w2a16", {"group": 16}), ("w4a16", {"awq": True}),
]  # fmt: skip


def written(llama, tmp_path, ids, to, scheme, options):
    request = Request(scheme, **options)
    quantize(llama, tmp_path / "own", request, ids)
    quantize(llama, tmp_path / "out", Request(scheme, to=to, **options), ids)
    return tmp_path / "out", logits(load(tmp_path / "own"), ids)


@pytest.mark.parametrize(("scheme", "options"), CASES)
def test_compressed_tensors_directories_load_in_transformers(llama, ids, tmp_path, scheme, options):
    pytest.importorskip("compressed_tensors", reason="the extra `llm` is not installed")
    import transformers

    out, want = written(llama, tmp_path, ids, "compressed-tensors", scheme, options)
    assert torch.equal(logits(load(out), ids), want)
    if options.get("asymmetric"):
        return  # below: this version of transformers wants unpacked zero points of a packed weight
    model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    with torch.no_grad():
        got = model(ids).logits
    assert float((got - want).norm() / want.norm()) < 1e-2
    if not scheme.startswith("w8a8"):
        assert float((got - want).norm() / want.norm()) < 2e-3


@pytest.mark.parametrize("text", ["int4[32]^fp16", "uint4[32]+z^fp16", "uint3[1,*]+z", "int8[32]^fp16"])
def test_packed_weights_are_decompressed_to_the_same_values(text):
    package = pytest.importorskip("compressed_tensors.compressors", reason="the extra `llm` is not installed")
    from compressed_tensors.quantization import QuantizationScheme

    from pennyweight.llm.schemes import Scheme
    from pennyweight.llm.store import Solved
    from pennyweight.llm.targets.compressed_tensors import arguments, packed

    scheme = Scheme.parse(text)
    q = methods["searched"].solve(Problem(torch.randn(16, 96), scheme.weight))
    tensors, _ = packed({"a": Solved(scheme, q)})
    local = {k.removeprefix("a."): v for k, v in tensors.items()}
    described = {k: v for k, v in arguments(scheme).items() if k != "format"}
    theirs = QuantizationScheme.model_validate({"targets": ["Linear"], **described})
    back = package.PackedQuantizationCompressor.decompress(local, theirs)["weight"]
    assert torch.allclose(back.float(), q.dequantize(), rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"scheme": "w4a16"},
        {"scheme": "w3a16"},
        {"scheme": "w8a16"},
        {"scheme": "w4a16", "asymmetric": True},
        {"scheme": "w2a16"},
    ],
)
def test_gptq_directories_hold_what_was_solved(llama, ids, tmp_path, options):
    out, want = written(
        llama, tmp_path, ids, "gptq", options["scheme"], {k: v for k, v in options.items() if k != "scheme"}
    )
    got = logits(load(out), ids)
    assert float((got - want).norm() / want.norm()) < (2e-3 if options["scheme"] == "w8a16" else 1e-6)
    layers, _ = readers["gptq"](Directory(out))
    layer = layers["model.layers.1.mlp.down_proj"]
    stored = Directory(out).load(
        [f"model.layers.1.mlp.down_proj.{t}" for t in ("qweight", "qzeros", "scales", "g_idx")]
    )
    words, zeros, scales, order = (t.numpy() for t in stored.values())
    bits = json.loads((out / "config.json").read_text())["quantization_config"]["bits"]
    plus = 0 if options.get("asymmetric") else 1

    def code(column, i):  # the layout's own words: a stream of bits down each column
        low = int(np.uint32(column[i * bits // 32])) >> (i * bits % 32)
        if i * bits % 32 + bits > 32:
            low |= int(np.uint32(column[i * bits // 32 + 1])) << (32 - i * bits % 32)
        return low & ((1 << bits) - 1)

    dense = layer.weight.dequantize()
    for o, i in ((0, 0), (5, 31), (17, 42), (63, 95)):
        g = int(order[i])
        zero = code(zeros[g], o) + plus
        value = (code(words[:, o], i) - zero) * float(scales[g, o])
        assert value == pytest.approx(float(dense[o, i]), abs=1e-6)


GGUF = [
    "int4[32]^fp16",
    "uint4[32]+z^fp16",
    "int5[32]^fp16",
    "uint5[32]+z^fp16",
    "int8[32]^fp16",
    "int6[16]^(int8[16]^fp16)",
    "uint4[32]+zf^(uint6[8]^fp16)",
    "uint5[32]+zf^(uint6[8]^fp16)",
]


@pytest.mark.parametrize("text", GGUF)
def test_blocks_are_what_the_package_decodes(text):
    gguf = pytest.importorskip("gguf", reason="the extra `llm` is not installed")
    from pennyweight.llm.targets.gguf import raw_blocks

    torch.manual_seed(0)
    q = methods["searched"].solve(Problem(torch.randn(6, 512), QuantSpec.parse(text)))
    kind, raw = raw_blocks(q)
    assert raw.shape == (6, 512 // gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][0]
                         * gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1])  # fmt: skip
    back = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind])
    want = q.dequantize().numpy()
    assert np.abs(back - want).max() < (2e-3 if "+z^" in text else 1e-6)


@pytest.mark.parametrize("method", ["rtn", "searched", "gptq"])
@pytest.mark.parametrize("scheme", ["q4_k", "q5_k"])
def test_superblocks_lose_little_and_stay_storable(method, scheme):
    from pennyweight.llm.schemes import scheme_of
    from pennyweight.llm.superblock import multiples

    made = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 512, generator=made) * torch.rand(6, 1, generator=made)
    weight[0, :256] = 0.0
    weight[1] = weight[1].abs() + 0.1  # minima of zero
    weight[2, 64:96] = 0.0
    x = torch.randn(1024, 512, generator=made)
    spec = scheme_of(scheme).weight
    gram = x.T @ x / len(x)
    q = methods[method].solve(Problem(weight, spec, gram))
    plain = methods[method].solve(Problem(weight, QuantSpec(spec.grid, (32,), "float"), gram))
    lost = [float((weight - f.dequantize()).pow(2).mean()) for f in (q, plain)]
    assert lost[0] < 1.2 * lost[1]
    d, e, a, b = multiples(q)
    dense = (d.float()[:, None] * a).repeat_interleave(32, 1) * q.codes.reshape(-1, 256)
    dense = (dense - (e.float()[:, None] * b).repeat_interleave(32, 1)).reshape(6, 512)
    torch.testing.assert_close(dense, q.dequantize(), atol=1e-6, rtol=1e-5)


def test_files_of_superblocks(ids, tmp_path):
    pytest.importorskip("gguf", reason="the extra `llm` is not installed")
    from tests.llm.conftest import make_llama

    make_llama(tmp_path / "wide", hidden_size=256, intermediate_size=256, num_hidden_layers=1)
    want = logits(load(tmp_path / "wide"), ids)
    for scheme, bound in (("q4_k", 0.1), ("q5_k", 0.05)):
        quantize(tmp_path / "wide", tmp_path / scheme, Request(scheme, method="gptq"), ids)
        quantize(
            tmp_path / "wide", tmp_path / f"{scheme}.gguf", Request(scheme, method="gptq", to="gguf"), ids
        )
        own = logits(load(tmp_path / scheme), ids)
        got = logits(load_file(tmp_path / f"{scheme}.gguf", tmp_path / "wide"), ids)
        assert float((got - own).norm() / own.norm()) < 1e-4
        assert float((own - want).norm() / want.norm()) < bound
    with pytest.raises(InputError, match="off the 6 bits"):
        quantize(tmp_path / "wide", tmp_path / "no", Request("q4_k", method="hqq"))
    with pytest.raises(InputError, match="says its groups"):
        quantize(tmp_path / "wide", tmp_path / "no", Request("q4_k", group=64))


def test_rows_that_do_not_fill_superblocks_are_refused(llama, tmp_path):
    with pytest.raises(SpecError, match="multiple of the block 8"):
        quantize(llama, tmp_path / "out", Request("q4_k", to="gguf"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", [{}, {"asymmetric": True}, {"head": "same"}])
def test_gguf_files_hold_the_whole_model(llama, ids, tmp_path, options):
    pytest.importorskip("gguf", reason="the extra `llm` is not installed")
    out, want = written(llama, tmp_path, ids, "gguf", "w4a16", options)
    assert out.is_file()
    got = logits(load_file(out, llama), ids)
    assert float((got - want).norm() / want.norm()) < 2e-3


@pytest.mark.parametrize("head", ["", "same"])
def test_gguf_files_are_read_with_the_head_they_have(ids, tmp_path, head):
    """A tied head that was quantized is a tensor of its own there."""
    pytest.importorskip("gguf", reason="the extra `llm` is not installed")
    from tests.llm.conftest import make_llama

    make_llama(tmp_path / "tied", tie_word_embeddings=True, num_hidden_layers=1)
    out, want = written(tmp_path / "tied", tmp_path, ids, "gguf", "w4a16", {"head": head, "method": "rtn"})
    model = load_file(out, tmp_path / "tied")
    got = logits(model, ids)
    assert float((got - want).norm() / want.norm()) < 2e-3
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == (not head)


@pytest.mark.parametrize("scheme", ["w4a16", "q4_k", "q5_k", "q6_k"])
def test_llama_cpp_computes_the_same_logits(ids, tmp_path, scheme):
    package = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    from tests.llm.conftest import make_llama

    make_llama(tmp_path / "wide", hidden_size=256, intermediate_size=512, num_hidden_layers=2)
    out, _ = written(tmp_path / "wide", tmp_path, ids, "gguf", scheme, {})
    runner = package.Llama(str(out), logits_all=True, n_ctx=64, verbose=False)
    runner.eval(ids[0].tolist())
    got = torch.from_numpy(np.array(runner.scores[: ids.shape[1]]))
    want = logits(load(tmp_path / "own"), ids[:1])[0]
    assert float((got - want).norm() / want.norm()) < 5e-2


@pytest.mark.parametrize(
    ("to", "request_", "words"),
    [
        ("gptq", Request("w4a8"), "weights alone"),
        ("gptq", Request("nf4", group=32), "integers of 2, 3, 4 or 8 bits"),
        ("gptq", Request("w4a16", head="w8a16"), "one scheme for all"),
        ("gptq", Request("w4a16", embeddings="int8n[1,*]"), "no tables"),
        ("compressed-tensors", Request("mxfp4"), "plain scales"),
        ("compressed-tensors", Request("w4a4"), "int8 activations"),
        ("gguf", Request("w3a16"), "no type for this"),
        ("gguf", Request("w4a16", group=16), "no type for this"),
        ("gguf", Request("uint4[16]+z^fp16"), "Q4_K and Q5_K"),
        ("gguf", Request("w8a8"), "no type for this"),
    ],
)
def test_what_a_file_cannot_hold_is_refused_before_the_work(llama, tmp_path, to, request_, words):
    from dataclasses import replace

    with pytest.raises(InputError, match=words):
        quantize(llama, tmp_path / "out", replace(request_, to=to))
    assert not list(tmp_path.iterdir())


def test_gguf_refuses_models_it_has_no_names_for(llama, tmp_path):
    folder = shutil.copytree(llama, tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "olmo"}))
    with pytest.raises(InputError, match=r"GGUF names of a 'olmo'"):
        quantize(folder, tmp_path / "out", Request("w4a16", to="gguf"))

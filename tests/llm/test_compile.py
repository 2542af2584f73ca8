"""Quantized models of `transformers` under `torch.compile`: one graph, the same logits."""

import pytest
import torch

from pennyweight.llm.load import load, logits
from pennyweight.llm.quantize import quantize
from pennyweight.llm.request import Request


@pytest.mark.parametrize(
    "request_",
    [Request("w4a8", head="w8a8"), Request("w4a16"), Request("nf4", group=32), Request("w8a8-static"),
     Request("w8a8", embeddings="int8n[1,*]")],
    ids=["w4a8", "w4a16", "nf4", "static", "tables"],
)  # fmt: skip
def test_a_quantized_model_is_one_graph(llama, ids, tmp_path, request_):
    quantize(llama, tmp_path / "out", request_, ids)
    model = load(tmp_path / "out")
    want = logits(model, ids[:2])
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        got = compiled(ids[:2], use_cache=False).logits
        shorter = compiled(ids[:1, :9], use_cache=False).logits  # another shape
    torch.testing.assert_close(got, want, atol=1e-4 * float(want.abs().max()), rtol=1e-4)
    torch.testing.assert_close(
        shorter, logits(model, ids[:1, :9]), atol=1e-4 * float(want.abs().max()), rtol=1e-4
    )

"""Codes as dense bits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pennyweight.errors import FormatError
from pennyweight.llm.methods import Problem, methods
from pennyweight.llm.schemes import Scheme
from pennyweight.llm.store import Solved, pack, pack_bits, unpack, unpack_bits


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 8), st.integers(1, 5), st.integers(1, 40), st.integers(0, 2**31))
def test_bits_come_back(bits, rows, n, seed):
    codes = torch.randint(0, 1 << bits, (rows, n), generator=torch.Generator().manual_seed(seed))
    packed = pack_bits(codes, bits)
    assert packed.shape == (rows, -(-n * bits // 8)) and packed.dtype == torch.uint8
    assert torch.equal(unpack_bits(packed, bits, n).long(), codes)


def test_the_first_code_is_in_the_lowest_bits():
    assert pack_bits(torch.tensor([[1, 2, 7]]), 3).tolist() == [[0b11010001, 0b1]]


@pytest.mark.parametrize(
    "text",
    ["int4[32]^fp16", "uint4[32]+z^fp16", "int3[16]^bf16", "int8n[1,*]/uint8[1,*]+z", "nf4[64]^fp16", "fp4_e2m1[32]^e8m0",
     "nf4[32]^(uint8[*])", "int2[32]+zf", "int8n[1,*]/uint8[*]+z!"],
)  # fmt: skip
def test_every_kind_of_weight_comes_back(text):
    torch.manual_seed(0)
    scheme = Scheme.parse(text)
    assert str(scheme) == text
    q = methods["searched"].solve(Problem(torch.randn(6, 64), scheme.weight))
    given_ = torch.tensor([0.5, 3.0]) if scheme.static else None
    tensors, schemes = pack({"a.b": Solved(scheme, q, given_)})
    back = unpack(tensors, schemes)["a.b"]
    assert torch.equal(back.weight.dequantize(), q.dequantize())
    assert torch.equal(back.weight.codes, q.codes) and back.weight.codes.dtype == q.codes.dtype
    assert back.input is None if given_ is None else torch.equal(back.input, given_)
    with pytest.raises(FormatError, match="codes"):
        unpack({k: v for k, v in tensors.items() if not k.endswith("weight.codes")}, schemes)
    with pytest.raises(FormatError, match="do not fit"):
        unpack({**tensors, "a.b.weight.codes": tensors["a.b.weight.codes"][:3]}, schemes)

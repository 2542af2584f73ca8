"""Recipe bf16: rounded operands, 16 bits in memory from one product to the next, the same results as eagerly."""

from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pennyweight as pw
from pennyweight.errors import UnrealisableSite
from pennyweight.plan import Rule
from pennyweight.program.interpret import interpret
from pennyweight.program.lower import lower
from pennyweight.program.ops import halved, real


@pytest.fixture(autouse=True)
def _inference():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.second, self.third = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        y = F.max_pool2d(F.relu(self.norm(self.first(x))), 2)
        y = F.relu(self.third(F.gelu(self.second(y))) + y)
        return self.head(y.mean((2, 3)))


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(16, 16) for _ in range(4))
        self.norm = nn.LayerNorm(16)

    def forward(self, x):
        q, k, v = (f(x).unflatten(-1, (2, 8)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.norm(x + self.out(y)) @ x.transpose(1, 2)


def lowered(model, *shape):
    x = torch.randn(shape)
    quantized = pw.quantize(model.eval(), None, "bf16", example=x, progress=False)
    program = lower(quantized, x)
    got = interpret(program, dict.fromkeys(program.inputs, x.numpy()))[program.outputs[0]]
    want, exact = quantized(x).numpy(), model(x).numpy()
    scale = np.abs(exact).max()
    assert np.abs(got - want).max() < 2**-6 * scale
    assert 0 < np.abs(got - exact).max() < 2**-4 * scale
    return quantized, program


def test_products_take_sixteen_bits():
    for model, shape in ((Block(), (2, 3, 8, 8)), (Encoder(), (2, 6, 16))):
        _, program = lowered(model, *shape)
        made = {name: op for op in program.ops for name in op.outputs}
        products = [op for op in program.ops if op.kind in ("conv_f32", "linear_f32", "matmul_f32")]
        assert len(products) >= 4

        def dtype(name, program=program, made=made):
            while name in made and made[name].kind in ("transpose", "reshape", "max_pool"):
                name = made[name].inputs[0]
            if name in program.constants:
                return program.constants[name].dtype
            return made[name].attrs.get("dtype", "") if name in made else "f32"

        assert all(dtype(n) == "bf16" for op in products for n in op.inputs[:2])


def test_memory_holds_the_rounded_value_once():
    _, program = lowered(Block(), 2, 3, 8, 8)
    readers = Counter(n for op in program.ops for n in op.inputs)
    rounded = [op for op in program.ops if op.kind == "cast" and op.attrs["dtype"] == "bf16"]
    assert rounded and all(readers[op.inputs[0]] == 1 for op in rounded)
    assert not any(
        op.kind == "max_pool" and op.inputs[0] not in {r.outputs[0] for r in rounded} for op in program.ops
    )


def test_files_are_half_as_large_and_run(tmp_path):
    model, x = Block().eval(), torch.randn(2, 3, 8, 8)
    quantized = pw.quantize(model, None, "bf16", example=x, progress=False)
    session = pw.load(pw.save(quantized, tmp_path / "m.dwt", x))
    halves = [c for c in session.program.constants.values() if c.dtype == "bf16"]
    assert len(halves) == 4 and all(c.data.itemsize == 2 for c in halves)
    assert np.abs(session.run(x.numpy()) - quantized(x).numpy()).max() < 2**-5
    again = pw.load(pw.save(quantized, tmp_path / "m.safetensors"), model, x)
    assert torch.equal(again(x), quantized(x))


def test_rounding_is_torchs():
    bits = torch.arange(-(2**31), 2**31, 65521, dtype=torch.int64).to(torch.int32)
    x = bits.view(torch.float32)
    want, got = x.bfloat16(), halved(x.numpy())
    nan = torch.isnan(x).numpy()
    assert np.array_equal(got[~nan], want.view(torch.uint16).numpy()[~nan])
    assert np.isnan(real(got)[nan]).all()


def test_mixed_with_float_and_int8_layers():
    x = torch.randn(4, 3, 8, 8)
    recipe = pw.Recipe.preset("bf16").keep("second")
    program = lower(pw.quantize(Block().eval(), None, recipe, example=x, progress=False), x)
    assert {c.dtype for n, c in program.constants.items() if n.startswith("second.weight")} == {"f32"}
    rule = Rule("second", keep="bfloat16", narrow=True)
    mixed = pw.quantize(Block().eval(), [x], pw.Recipe.preset("int8").with_rules(rule), progress=False)
    kinds = Counter(op.kind for op in lower(mixed, x).ops)
    assert kinds["conv"] == 2 and kinds["conv_f32"] == 1


def test_only_bf16_is_narrow():
    recipe = pw.Recipe.preset("bf16").with_rules(Rule("head", keep="float16", narrow=True))
    with pytest.raises(UnrealisableSite, match="bf16"):
        pw.quantize(Block().eval(), None, recipe, example=torch.randn(1, 3, 8, 8), progress=False)

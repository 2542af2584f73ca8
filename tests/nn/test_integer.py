"""Int8 activations, ranged per token, times int4 weights in groups: eager op, program, engine and file agree."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pennyweight as pw
from pennyweight.errors import UnrealisableSite
from pennyweight.kernels import reference
from pennyweight.passes.solve import Solve
from pennyweight.program.interpret import interpret
from pennyweight.ranges import ranges
from pennyweight.runtime import library
from pennyweight.runtime.engine import Engine
from pennyweight.solvers import solvers
from pennyweight.spec import QuantSpec


class Mixed(nn.Module):
    """A linear layer, a call on a raw parameter, and a layer that groups of 32 do not divide."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(64, 96)
        self.raw = nn.Parameter(torch.randn(64, 96) / 10)
        self.last = nn.Linear(64, 5, bias=False)
        self.odd = nn.Linear(5, 3)

    def forward(self, x):
        h = F.linear(torch.relu(self.first(x)), self.raw)
        return self.odd(torch.relu(self.last(h)))


@pytest.fixture
def example():
    return torch.randn(7, 64, generator=torch.Generator().manual_seed(1))


def grouped_recipe(weight="int4[32]"):
    specs = QuantSpec.parse(weight), QuantSpec.parse("uint8[1,*]+z")
    rule = pw.Rule(types=("Linear", "linear"), weight=specs[0], input=specs[1], dynamic=True)
    return pw.Recipe("grouped", rules=(rule,), passes=(Solve(),))


def test_the_preset_gives_one_meaning(example, tmp_path):
    model = Mixed()
    done = pw.quantize(model, [], recipe="int8-dynamic-int4", example=example)
    program = pw.lower(done, example)
    kinds = [op.kind for op in program.ops]
    assert kinds.count("linear_grouped") == 4 and "linear" not in kinds
    want = interpret(program, {next(iter(program.inputs)): example.numpy()})[program.outputs[0]]
    for isa in library.supported_isas():
        got = Engine(program, isa=isa).run({next(iter(program.inputs)): example.numpy()})
        assert np.array_equal(got[program.outputs[0]], want), isa
    assert np.array_equal(done(example).detach().numpy(), want)
    # codes of 4 bits lie two to a byte
    stored = [c for c in program.constants.values() if c.dtype == "u4"]
    assert sorted(c.data.shape for c in stored) == [(3, 3), (5, 32), (64, 48), (96, 32)]
    path = tmp_path / "model.dwt"
    pw.save(done, path, example)
    session = pw.load(path)
    for rows in (1, 7):
        x = example[:rows]
        assert np.array_equal(np.asarray(session(x.numpy())), done(x).detach().numpy())


def test_close_to_the_float_model(example):
    linear = nn.Linear(64, 96)
    torch.manual_seed(3)
    done = pw.quantize(nn.Sequential(linear), [], recipe=grouped_recipe("int8[32]"), example=example)
    error = (done(example) - linear(example)).norm() / linear(example).norm()
    assert error < 0.02


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("per_token", [True, False])
def test_the_reference_is_the_law_written_out(bits, per_token):
    generator = torch.Generator().manual_seed(bits)
    x = torch.randn(3, 12, generator=generator)
    low = -(1 << (bits - 1))
    w = torch.randint(low, -low, (5, 12), generator=generator, dtype=torch.int8)
    scale, bias = torch.rand(5, 3, generator=generator), torch.randn(5, generator=generator)
    codes = w
    if bits == 4:
        codes = ((w[:, ::2].int() & 15) | ((w[:, 1::2].int() & 15) << 4)).to(torch.uint8)
    got = reference.linear_grouped(x, codes, scale, bias, per_token, bits, 12).numpy()
    engine = torch.ops.pennyweight.linear_grouped(x, codes, scale, bias, per_token, bits, 12)
    assert np.array_equal(engine.numpy(), got)
    f32 = np.float32
    for m in range(3):
        row = x[m].numpy() if per_token else x.numpy()
        lo, hi = min(row.min(), f32(0)), max(row.max(), f32(0))
        sx = f32(hi - lo) * (f32(1) / f32(255))
        zx = int(np.rint(-lo * (f32(1) / sx)))
        q = np.clip(np.rint(x[m].numpy() * (f32(1) / sx)) + zx, 0, 255).astype(int)
        for o in range(5):
            t = f32(0)
            for g in range(3):
                acc = sum((q[i] - zx) * int(w[o, i]) for i in range(4 * g, 4 * g + 4))
                t = t + f32(acc) * scale[o, g].numpy()
            assert got[m, o] == f32(t * sx) + bias[o].numpy()


@pytest.mark.parametrize(
    "weight", ["int4[2,32]", "int4[*,32]", "int8[3,*]", "int3[32]", "int4[1,*]", "int2[*]"]
)
def test_blocks_of_several_rows_and_fewer_bits(weight, example):
    torch.manual_seed(4)
    linear = nn.Linear(64, 96)
    done = pw.quantize(nn.Sequential(linear), [], recipe=grouped_recipe(weight), example=example)
    with torch.no_grad():
        rounded = solvers["rtn"](linear.weight, QuantSpec.parse(weight), ranges["minmax"]()).dequantize()
        want = F.linear(example, rounded, linear.bias)
        assert (done(example) - want).norm() < 0.01 * want.norm()
    program = pw.lower(done, example)
    got = interpret(program, {next(iter(program.inputs)): example.numpy()})[program.outputs[0]]
    assert np.array_equal(got, done(example).detach().numpy())


@pytest.mark.parametrize("weight", ["uint4[32]", "uint8[1,*]", "int8[1,*]+z"])
def test_codes_that_are_not_zero_for_zero_are_refused(weight, example):
    with pytest.raises(UnrealisableSite, match="signed codes"):
        pw.quantize(Mixed().first, [], recipe=grouped_recipe(weight), example=example)


def test_groups_with_zero_points_or_in_convolutions_are_refused(example):
    with pytest.raises(UnrealisableSite, match="without zero points"):
        pw.quantize(Mixed().first, [], recipe=grouped_recipe("int4[32]+z"), example=example)
    spec, x = QuantSpec.parse("int4[9]"), torch.randn(1, 2, 5, 5)
    rule = pw.Rule(types=("Conv2d",), weight=spec, input=QuantSpec.parse("uint8[*]+z"), dynamic=True)
    recipe = pw.Recipe("conv", rules=(rule,), passes=(Solve(),))
    with pytest.raises(UnrealisableSite, match="linear layers"):
        pw.quantize(nn.Sequential(nn.Conv2d(2, 3, 3)), [], recipe=recipe, example=x)


@pytest.mark.parametrize(
    ("weight", "dynamic"),
    [
        ("int8[1,*]+z", False),
        ("int4[1,*]+zf", False),
        ("int4[8]", False),
        ("int4[8]", True),
        ("int8[1,*]+z", True),
    ],
)
def test_what_convolutions_cannot_be_is_told_before_calibration(weight, dynamic):
    """Not a batch is read; what only a byte too small forbids is known from the spec."""

    def batches():
        yield torch.randn(1, 2, 5, 5)
        raise AssertionError("a second batch was read")

    specs = QuantSpec.parse(weight), QuantSpec.parse("uint8[*]+z")
    rule = pw.Rule(types=("Conv2d",), weight=specs[0], input=specs[1], dynamic=dynamic)
    recipe = pw.Recipe.preset("int8").with_rules(rule)
    with pytest.raises(UnrealisableSite, match="integer activations") as raised:
        pw.quantize(nn.Sequential(nn.Conv2d(2, 8, 2)), batches(), recipe=recipe, progress=False)
    assert raised.value.site == "0" and raised.value.spec == weight


@pytest.mark.parametrize("weight", ["int8[8]", "int8[1,12]"])
def test_an_attention_takes_its_rows_of_the_groups(weight):
    torch.manual_seed(5)
    attention, x = nn.MultiheadAttention(24, 2, batch_first=True).eval(), torch.randn(2, 5, 24)
    specs = QuantSpec.parse(weight), QuantSpec.parse("uint8[1,*]+z")
    rule = pw.Rule(types=("MultiheadAttention",), weight=specs[0], input=specs[1], dynamic=True)
    recipe = pw.Recipe("attention", rules=(rule,), passes=(Solve(),))
    with torch.no_grad():
        want = attention(x, x, x, need_weights=False)[0]
        done = pw.quantize(attention, [(x, x, x)], recipe=recipe)
        got = done(x, x, x, need_weights=False)[0]
    assert (got - want).norm() < 0.02 * want.norm()

"""Levels that need more than 8 bits meet integer activations: one table, weights of 16 bits, sums that fit int32."""

import numpy as np
import pytest
import torch
from torch import nn

import pennyweight as pw
from pennyweight.errors import UnrealisableSite, VerifyError
from pennyweight.formats import grids
from pennyweight.nn.integer import bias_codes, worst_sums
from pennyweight.nn.packing import code_bits, weight_codes
from pennyweight.plan import Rule
from pennyweight.program.bounds import check
from pennyweight.program.interpret import interpret
from pennyweight.program.ir import Constant, Op, Program, TensorType
from pennyweight.program.verify import verify
from pennyweight.runtime.engine import Engine
from pennyweight.runtime.format import read
from pennyweight.runtime.library import supported_isas
from pennyweight.runtime.widen import widened
from pennyweight.spec import QuantSpec

WIDE = {"pot5": 8, "apot7": 8, "sqrt2_4": 4, "sqrt2_5": 8}  # bits of a stored code


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1), nn.ReLU(), nn.ConvTranspose2d(6, 4, 2, stride=2), nn.Flatten(),
        nn.Linear(4 * 12 * 12, 70), nn.ReLU(), nn.Linear(70, 9),
    ).eval()  # fmt: skip


def quantized(grid, dynamic=False, model=None, shape=(4, 2, 6, 6)):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    spec = QuantSpec.parse(f"{grid}[1,*]")
    rule = Rule(weight=spec, input=QuantSpec.parse("uint8[*]+z"), dynamic=dynamic)
    recipe = pw.Recipe.preset("int8-dynamic" if dynamic else "int8").with_rules(rule)
    return pw.quantize(network() if model is None else model, [(x,)], recipe, progress=False), x


@pytest.mark.parametrize("grid", WIDE)
def test_levels_are_multiples_of_their_unit(grid):
    book = grids[grid]
    assert book.multiples is None
    assert max(book.wide) > 127
    exact = torch.tensor(book.wide, dtype=torch.float64) * book.unit
    assert torch.equal(exact.float(), book.levels())


@pytest.mark.parametrize(
    ("grid", "dynamic"), [*((g, False) for g in WIDE), ("pot5", True), ("sqrt2_4", True)]
)
def test_one_meaning_from_module_to_kernel(grid, dynamic, tmp_path):
    """Module, saved module, program, file and engine on every instruction set: the same results."""
    model, x = quantized(grid, dynamic)
    want, linear = model(x), model[4]
    assert linear.table.dtype == torch.int16
    assert code_bits(linear.table) == WIDE[grid]
    assert linear.codes.shape == (70, 576 * WIDE[grid] // 8)
    codes = weight_codes(linear.codes, linear.table, 576)
    weight = codes.double() * linear.scale.double().reshape(-1, 1)
    nearest = grids[grid].levels().double() * float(network()[4].weight[0].abs().max())
    float_row = network()[4].weight[0].detach().double()
    assert set(codes.unique().tolist()) <= set(grids[grid].wide)
    gap = (nearest[1:] - nearest[:-1]).max() / 2
    assert float((weight[0] - float_row).abs().max()) <= float(gap) * 1.05

    pw.save(model, tmp_path / "m.safetensors")
    again = pw.load(tmp_path / "m.safetensors", model=network(), example=(x,))
    assert torch.equal(again[4].table, linear.table)
    assert torch.equal(again(x), want)

    program = pw.lower(model, (x,))
    assert sum(op.kind == "unpack" for op in program.ops) == 4
    pw.save(model, tmp_path / "m.dwt", example=(x,))
    stored = read(tmp_path / "m.dwt")
    assert sorted(c.dtype for c in stored.constants.values()).count("i16") >= 1
    np.testing.assert_allclose(pw.Session(stored).run(x.numpy()), want.detach().numpy(), atol=2e-4)
    name = next(iter(stored.inputs))
    for isa in supported_isas():
        for rows in (1, 9):
            inputs = {name: np.ascontiguousarray(np.resize(x.numpy(), (rows, 2, 6, 6)))}
            engine = Engine(widened(stored), isa=isa, threads=1)
            kernels = [s["kernel"].rpartition("::")[2] for s in engine.steps(inputs)]
            assert kernels.count("gemm_wide") == 4, (isa, rows)
            for key, value in interpret(stored, inputs).items():
                assert np.array_equal(engine.run(inputs)[key], value), (isa, rows)


def test_sums_beyond_int32_are_refused_and_named():
    model = nn.Sequential(nn.Linear(700, 3, bias=False)).eval()
    with torch.no_grad():
        model[0].weight.fill_(1.0)  # 700 * 2^14 * 255 > 2^31
    with pytest.raises(UnrealisableSite, match="beyond int32") as error:
        quantized("pot5", model=model, shape=(4, 700))
    assert error.value.site == "0"
    assert "pot4" in str(error.value)
    with torch.no_grad():
        model[0].weight[:, 1:] = 0.5  # half of it fits
    small, x = quantized("pot5", model=model, shape=(4, 700))
    assert small(x).isfinite().all()


def test_groups_are_refused():
    model = nn.Sequential(nn.Linear(64, 4)).eval()
    rule = Rule(weight=QuantSpec.parse("pot5[32]"), input=QuantSpec.parse("uint8[*]+z"))
    x = torch.randn(4, 64)
    with pytest.raises(UnrealisableSite, match="scale per row"):
        pw.quantize(model, [(x,)], pw.Recipe.preset("int8").with_rules(rule), progress=False)


def test_a_bias_without_room_beside_the_products_stays_a_float():
    codes = torch.full((2, 8000), 1000, dtype=torch.int16)
    sums = worst_sums(codes)
    assert sums.tolist() == [255 * 8000 * 1000] * 2
    x_scale, scale = torch.tensor(0.01), torch.tensor([0.01, 0.01])
    room = (2**31 - 1 - int(sums[0])) * 1e-4
    inside, outside = torch.tensor([0.9 * room, 0.0]), torch.tensor([1.1 * room, 0.0])
    assert bias_codes(inside, x_scale, scale, sums).dtype == torch.int32
    assert bias_codes(outside, x_scale, scale, sums).dtype == torch.float32
    assert bias_codes(outside, x_scale, scale).dtype == torch.int32


def product(weight):
    ops = [Op("linear", ("x", "w", ""), ("y",), {"zero": 0}, "layer")]
    return Program({"x": TensorType("u8", (2, weight.shape[1]))}, ["y"], ops, {"w": Constant("i16", weight)})


def test_readers_refuse_programs_whose_sums_overflow_or_that_use_16_bits_elsewhere():
    fits = product(np.full((1, 257), 32767, np.int16))
    check(fits, verify(fits))
    over = product(np.full((1, 258), 32767, np.int16))
    with pytest.raises(VerifyError, match="beyond int32"):
        check(over, verify(over))
    fits.ops.append(Op("reshape", ("w",), ("z",), {"shape": [257]}, ""))
    with pytest.raises(VerifyError, match="i16"):
        verify(fits)
    table = {
        "codes": Constant("u8", np.full((1, 300), 255, np.uint8)),
        "table": Constant("i16", np.full(256, 32767, np.int16)),
    }
    ops = [
        Op("unpack", ("codes", "table"), ("w",), {"bits": 8, "shape": [1, 300]}, ""),
        Op("linear", ("x", "w", ""), ("y",), {"zero": 0}, "layer"),
    ]
    packed = Program({"x": TensorType("u8", (2, 300))}, ["y"], ops, table)
    with pytest.raises(VerifyError, match="beyond int32"):
        check(packed, verify(packed))
    table["codes"].data[0, 200:] = 0
    table["table"].data[0] = 100
    check(packed, verify(packed))

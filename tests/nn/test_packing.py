"""Codes of a few bits: packing, tables, and what converted layers store, lower and run."""

import numpy as np
import pytest
import torch
from torch import nn

import pennyweight as pw
from pennyweight.formats import grids
from pennyweight.nn.integer import less_zero
from pennyweight.nn.packing import code_bits, pack_codes, tabled, unpack_codes, weight_codes
from pennyweight.program.interpret import interpret
from pennyweight.qtensor import QParams, QTensor, quantize
from pennyweight.ranges import ranges
from pennyweight.runtime.engine import Engine
from pennyweight.runtime.format import read
from pennyweight.runtime.library import supported_isas
from pennyweight.runtime.widen import widened
from pennyweight.solvers import solvers
from pennyweight.spec import QuantSpec


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("n", [1, 7, 8, 33])
def test_packing_is_undone(bits, n):
    codes = torch.randint(0, 1 << bits, (3, n), dtype=torch.uint8)
    packed = pack_codes(codes, bits)
    assert packed.shape == (3, -(-n * bits // 8)) and packed.dtype == torch.uint8
    assert torch.equal(unpack_codes(packed, bits, n), codes)
    assert int(packed[0, 0]) & ((1 << bits) - 1) == int(codes[0, 0])  # the first code is in the low bits


@pytest.mark.parametrize(
    ("grid", "bits", "levels"),
    [
        ("binary", 1, [-1, 1]),
        ("ternary", 2, [-1, 0, 1]),
        ("seq2", 2, [-3, -1, 1, 3]),
        ("int3", 4, list(range(-4, 4))),
        ("pot4", 4, [-64, -32, -16, -8, -4, -2, -1, 0, 1, 2, 4, 8, 16, 32, 64]),
    ],
)
def test_tables(grid, bits, levels):
    spec = QuantSpec.parse(f"{grid}[1,*]")
    q = quantize(torch.randn(5, 40), spec, QParams(torch.full((5, 1), 0.5), None))
    places, table = tabled(q)
    assert code_bits(table) == bits and table.tolist()[: len(levels)] == levels
    assert int(places.max()) < len(levels)
    unit = getattr(grids[grid], "unit", 1.0)
    weight = weight_codes(pack_codes(places, bits), table, 40).float() * unit * 0.5
    assert torch.allclose(weight, q.dequantize())


def test_what_has_no_table():
    codes = torch.zeros(2, 4, dtype=torch.int8)
    one = torch.ones(2, 1)
    assert tabled(QTensor(codes, one, None, QuantSpec.parse("int8[1,*]"))) is None
    assert tabled(QTensor(codes.byte(), one, None, QuantSpec.parse("apot5[1,*]"))) is None  # 27 levels
    assert tabled(QTensor(codes.byte(), one, None, QuantSpec.parse("nf4[1,*]"))) is None  # no unit
    assert tabled(QTensor(codes, one, torch.ones(2, 1), QuantSpec.parse("int4[1,*]+zf"))) is None


@pytest.mark.parametrize(
    "text", ["int4[1,*]+z", "uint4[1,*]+z", "uint3[1,*]+z", "int2[2,*]+z", "uint4[*]+z", "uint4[1,*]"]
)
def test_tables_of_rows_with_zero_points(text):
    spec, weight = QuantSpec.parse(text), torch.randn(6, 40) + torch.linspace(-2, 2, 6)[:, None]
    q = solvers["rtn"](weight, spec, ranges["minmax"]())
    places, table = tabled(q)
    rows = 1 if spec.zero == "none" or not spec.block else 6
    assert table.shape == ((16,) if rows == 1 else (6, 4 if "int2" in text else 16))
    levels = weight_codes(pack_codes(places, code_bits(table)), table, 40)
    assert levels.dtype == torch.int8
    each = q.scales().repeat_interleave(6 // len(q.scales()), 0)
    assert torch.equal(levels.float() * each, q.dequantize())
    assert torch.equal(less_zero(q).dequantize(), q.dequantize())


@pytest.mark.parametrize("bits", [5, 6, 7])
def test_zero_points_vanish_where_a_byte_holds_the_difference(bits):
    q = solvers["rtn"](torch.rand(4, 30) + 0.1, QuantSpec.parse(f"uint{bits}[1,*]+z"), ranges["minmax"]())
    signed = less_zero(q)
    assert signed.codes.dtype == torch.int8 and signed.zero is None
    assert int(signed.codes.max()) == 2**bits - 1 and torch.equal(signed.dequantize(), q.dequantize())
    wide = QTensor(torch.tensor([[255, 0]], dtype=torch.uint8), torch.ones(1, 1), torch.ones(1, 1), QuantSpec.parse("uint8[1,*]+z"))  # fmt: skip
    assert less_zero(wide) is wide


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, bias=False), nn.ReLU(), nn.ConvTranspose2d(6, 4, 2, stride=2), nn.Flatten(),
        nn.Linear(4 * 8 * 8, 70), nn.ReLU(), nn.Linear(70, 9),
    ).eval()  # fmt: skip


@pytest.mark.parametrize("spec", ["binary[1,*]", "ternary[1,*]", "pot4[1,*]", "uint2[1,*]+z"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_layers_stay_packed_from_module_to_kernel(spec, dynamic, tmp_path):
    """Module, saved module, program, file and engine: the same results; files hold bits, few rows run packed, but those
    of zero points."""
    model, x = network(), torch.randn(4, 2, 6, 6)
    recipe = pw.Recipe.preset("int8-dynamic" if dynamic else "int8").with_rules(
        pw.Rule(
            weight=QuantSpec.parse(spec),
            input=QuantSpec.parse("uint8[*]+z"),
            dynamic=dynamic,
        )
    )
    quantized = pw.quantize(model, [(x,)], recipe, progress=False)
    linear = quantized[4]
    bits = code_bits(linear.table)
    assert linear.codes.shape == (70, 256 * bits // 8)
    want = quantized(x)

    pw.save(quantized, tmp_path / "m.safetensors")
    again = pw.load(tmp_path / "m.safetensors", model=network(), example=(x,))
    assert torch.equal(again[4].codes, linear.codes) and torch.equal(again[4].table, linear.table)
    assert torch.equal(again(x), want)

    program = pw.lower(quantized, (x,))
    unpacks = [op for op in program.ops if op.kind == "unpack"]
    assert len(unpacks) == 4
    pw.save(quantized, tmp_path / "m.dwt", example=(x,))
    session = pw.Session(read(tmp_path / "m.dwt"))
    got = session.run(x.numpy())
    np.testing.assert_allclose(got, want.detach().numpy(), atol=1e-4)
    name = next(iter(program.inputs))
    for isa in supported_isas():
        for rows in (1, 3, 9):
            inputs = {name: np.ascontiguousarray(np.resize(x.numpy(), (rows, 2, 6, 6)))}
            engine = Engine(widened(program), isa=isa, threads=1)
            kernels = [s["kernel"].rpartition("::")[2] for s in engine.steps(inputs)]
            assert kernels.count("gemm_bits") == (2 if rows < 9 and "+z" not in spec else 0), (isa, rows)
            for key, value in interpret(program, inputs).items():
                assert np.array_equal(engine.run(inputs)[key], value), (isa, rows)

"""Linear layers on levels that are no integers: module, program, file and engine say the same."""

import pytest
import torch
from torch import nn

import pennyweight as pw
from pennyweight.nn.conv import LevelConv
from pennyweight.nn.levels import LevelLinear
from pennyweight.passes.solve import Solve
from pennyweight.recipe import Recipe
from pennyweight.spec import QuantSpec

SPECS = ["fp8_e4m3[1,*]", "fp8_e5m2[32]^e8m0", "fp6_e3m2[32]^e8m0", "nf4[16]^(uint8[*])", "nf4[*]", "sqrt2_4[1,*]",
         "nf4[2,32]"]  # fmt: skip


@pytest.mark.parametrize("text", SPECS)
def test_all_forms_agree(text, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 5, bias=False)).eval()
    x = torch.randn(7, 32)
    spec = QuantSpec.parse(text)
    rule = "mx" if "e8m0" in text else "minmax"
    recipe = Recipe("levels", (pw.Rule("0", weight=spec),), (Solve("rtn", rule),))
    quantized = pw.quantize(model, [x], recipe=recipe)
    layer = quantized[0]
    assert isinstance(layer, LevelLinear)
    packed = layer.bits == 4
    assert layer.codes.shape == (24, 16 if packed else 32)
    with torch.no_grad():
        want, plain = quantized(x), model(x)
    assert 0 < float((want - plain).norm() / plain.norm()) < 0.2
    program = pw.lower(quantized, x)
    assert [op.kind for op in program.ops].count("decode_levels") == 1  # the file keeps codes
    (name,), (output,) = program.inputs, program.outputs
    exact = torch.from_numpy(pw.interpret(program, {name: x.numpy()})[output])
    assert torch.allclose(exact, want, rtol=1e-5, atol=1e-6)
    path = tmp_path / "levels.dwt"
    pw.save(quantized, path, example=x)
    assert torch.allclose(torch.from_numpy(pw.load(path)(x.numpy())), exact, rtol=1e-5, atol=1e-6)


CONVOLUTIONS = {
    "strided": (nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 7, 6)),
    "grouped": (
        nn.Conv2d(4, 6, (1, 3), groups=2, bias=False, padding="same", padding_mode="circular"),
        (1, 4, 5, 6),
    ),
    "depthwise": (nn.Conv2d(4, 4, 3, groups=4), (1, 4, 5, 6)),
    "turned": (nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1), (2, 4, 5)),
    "single": (nn.Conv1d(4, 6, 3), (4, 9)),
}


@pytest.mark.parametrize("text", ["fp8_e4m3[1,*]", "nf4[1,*]"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name, text, tmp_path):
    torch.manual_seed(0)
    layer, shape = CONVOLUTIONS[name]
    model = nn.Sequential(layer, nn.Tanh()).eval()
    x = torch.randn(shape)
    recipe = Recipe("levels", (pw.Rule("0", weight=QuantSpec.parse(text)),), (Solve("rtn", "minmax"),))
    quantized = pw.quantize(model, [x], recipe=recipe)
    assert isinstance(quantized[0], LevelConv)
    with torch.no_grad():
        want, plain = quantized(x), model(x)
    assert want.shape == plain.shape
    assert 0 < float((want - plain).norm() / plain.norm()) < 0.2
    program = pw.lower(quantized, x)
    assert [op.kind for op in program.ops].count("decode_levels") == 1
    (given,), (output,) = program.inputs, program.outputs
    exact = torch.from_numpy(pw.interpret(program, {given: x.numpy()})[output])
    assert torch.allclose(exact, want, rtol=1e-5, atol=1e-6)
    path = tmp_path / "levels.dwt"
    pw.save(quantized, path, example=x)
    session = pw.load(path)
    assert torch.allclose(torch.from_numpy(session(x.numpy())), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("text", "rows", "kernel"), [("nf4[16]", 1, "gemm_codes"), ("fp8_e5m2[1,*]", 8, "gemm_codes"),
                                                      ("fp8_e5m2[1,*]", 9, "gemm_f32")])  # fmt: skip
def test_few_rows_are_decoded_in_registers(text, rows, kernel):
    torch.manual_seed(0)
    x = torch.randn(rows, 32)
    recipe = Recipe("levels", (pw.Rule(weight=QuantSpec.parse(text)),), (Solve("rtn", "minmax"),))
    quantized = pw.quantize(nn.Sequential(nn.Linear(32, 24)).eval(), [x], recipe=recipe)
    session = pw.Session(pw.lower(quantized, x), backend="native")
    assert kernel in " ".join(row["kernel"] for row in session.profile(x.numpy()))

"""Linear layers on levels that are no integers: module, program, file and engine say the same."""

import pytest
import torch
from torch import nn

import pennyweight as pw
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

"""Rewriting code: every spelling of an import, nothing else of a file, twice the same, and what is left is named."""

import textwrap
from pathlib import Path

import pytest

pytest.importorskip("libcst")
from pennyweight.cli.main import main
from pennyweight.compat.migrate import rewrite
from pennyweight.compat.migrate.rules import moved

HERE = "pennyweight.compat"
CASES = {
    "import torch.quantization\nx = torch.quantization.prepare(m)\n": (
        f"import {HERE}.quantization\nx = {HERE}.quantization.prepare(m)\n"
    ),
    "import torch\nimport torch.ao.quantization\ntorch.ao.quantization.convert(m)\ntorch.ones(1)\n": (
        f"import torch\nimport {HERE}.quantization\n{HERE}.quantization.convert(m)\ntorch.ones(1)\n"
    ),
    "import torch.quantization\ntorch.ones(1)\n": f"import torch\nimport {HERE}.quantization\ntorch.ones(1)\n",
    "import torch.ao.quantization as tq\ntq.prepare_qat(m)\n": (
        f"import {HERE}.quantization as tq\ntq.prepare_qat(m)\n"
    ),
    "import torch\ny = torch.quantization.QuantStub()\n": (
        f"import {HERE}.quantization\nimport torch\ny = {HERE}.quantization.QuantStub()\n"
    ),
    "from torch.ao.quantization import (\n    QConfigMapping,  # which\n    get_default_qconfig as g,\n)\n": (
        f"from {HERE}.quantization import (\n    QConfigMapping,  # which\n    get_default_qconfig as g,\n)\n"
    ),
    "from torch.ao import quantization\nquantization.prepare(m)\n": (
        f"from {HERE} import quantization\nquantization.prepare(m)\n"
    ),
    "from torch import nn, quantization as q  # both\n": (
        f"from {HERE} import quantization as q\nfrom torch import nn  # both\n"
    ),
    "from torch import nn\nf = nn.quantized.FloatFunctional()\n": (
        f"import {HERE}.nn.quantized\nfrom torch import nn\nf = {HERE}.nn.quantized.FloatFunctional()\n"
    ),
    "import torch as th\nth.ao.quantization.quantize_fx.prepare_qat_fx(m, d)\n": (
        f"import {HERE}.quantization.quantize_fx\nimport torch as th\n"
        f"{HERE}.quantization.quantize_fx.prepare_qat_fx(m, d)\n"
    ),
    "from torch._export import capture_pre_autograd_graph\n": f"from {HERE}.export import capture_pre_autograd_graph\n",
    "from torch.export import Dim, export_for_training\n": (
        f"from {HERE}.export import export_for_training\nfrom torch.export import Dim\n"
    ),
    "import torch\ne = torch.export.export_for_training(m, a)\n": (
        f"import {HERE}.export\nimport torch\ne = {HERE}.export.export_for_training(m, a)\n"
    ),
    "from torchao.quantization.prototype.qat import Int8DynActInt4WeightQATQuantizer\n": (
        f"from {HERE}.torchao.quantization.qat import Int8DynActInt4WeightQATQuantizer\n"
    ),
    "from torchao.quantization import quantize_, int4_weight_only\n": (
        f"from {HERE}.torchao.quantization import quantize_, int4_weight_only\n"
    ),
    "from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e\n": (
        f"from {HERE}.quantization.quantize_pt2e import prepare_pt2e\n"
    ),
    "from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import XNNPACKQuantizer\n": (
        f"from {HERE}.quantization.quantizer.xnnpack_quantizer import XNNPACKQuantizer\n"
    ),
    '"""Doc."""\nfrom __future__ import annotations\n\n# why\nimport torch\n\n\nx = torch.quantization.default_qconfig\n': (
        f'"""Doc."""\nfrom __future__ import annotations\n\n# why\nimport {HERE}.quantization\nimport torch\n\n\n'
        f"x = {HERE}.quantization.default_qconfig\n"
    ),
    "from torch.ao.quantization.observer import *\n": f"from {HERE}.quantization.observer import *\n",
}


@pytest.mark.parametrize("old", CASES, ids=range(len(CASES)))
def test_spellings(old):
    result = rewrite(old)
    assert result.code == CASES[old]
    assert result.notes == []
    assert rewrite(result.code).code == result.code


@pytest.mark.parametrize(
    "code",
    ["", "import torch\nx = torch.ones(3)\n", "import numpy as torch\ntorch.quantization = 1\n",
     "def quantization():\n    torch = {}\n    return torch.quantization\n", "from . import quantization\n",
     "s = 'torch.quantization'  # torch.ao.quantization\n", "x=1;y =2\t\r\nz= [ 1,2 ]\r\n"],
)  # fmt: skip
def test_other_code_stays_byte_for_byte(code):
    assert rewrite(code).code == code


def test_layout_and_comments_survive():
    old = textwrap.dedent(
        """
        import torch   # keep   me
        from torch.ao.quantization import ( prepare,convert )   # and me

        def f( m ):   # odd   spacing
            return torch.quantization.prepare( m , inplace = True )  # here
        """
    )
    new = rewrite(old).code
    assert "import torch   # keep   me" in new
    assert f"from {HERE}.quantization import ( prepare,convert )   # and me" in new
    assert f"    return {HERE}.quantization.prepare( m , inplace = True )  # here" in new


@pytest.mark.parametrize(
    ("line", "words"),
    [("print(torch.backends.quantized.engine)", "get_default_qconfig"), ("torch.jit.script(m)", "pw.save"),
     ("torch.quantize_per_tensor(x, 1, 0, torch.qint8)", "QTensor"),
     ("torch.quantization.no_such_thing(m)", "no_such_thing"), ("torch.ao.nn.qat.Conv2d(1, 1, 1)", "Prepare")],
)  # fmt: skip
def test_what_cannot_be_carried_over_is_named(line, words):
    result = rewrite(f"import torch\nimport torch.quantization\n\n{line}\n")
    assert [n.line for n in result.notes] == [4]
    assert words in f"{result.notes[0].why} {result.notes[0].instead}"


def test_scripting_alone_is_nobodys_business():
    assert rewrite("import torch\ntorch.jit.script(m)\n").notes == []


def test_longest_name_wins():
    assert moved("torchao.quantization.pt2e.quantize_pt2e") == f"{HERE}.quantization.quantize_pt2e"
    assert moved("torch.quantization_of_mine") is None


def test_command_shows_then_writes(tmp_path, capsys):
    one, two = tmp_path / "one.py", tmp_path / "sub" / "two.py"
    two.parent.mkdir()
    one.write_bytes(b"import torch.quantization\r\ntorch.quantization.prepare(m)\r\n")
    two.write_text("x = 1\n")
    before = one.read_bytes()
    assert main(["migrate", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "-import torch.quantization" in shown
    assert "2 files read, 1 to change" in shown
    assert one.read_bytes() == before
    assert main(["migrate", str(tmp_path), "--write"]) == 0
    assert one.read_bytes() == before.replace(b"torch.quantization", f"{HERE}.quantization".encode())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one.py", "sub"]
    capsys.readouterr()
    assert main(["migrate", str(tmp_path), "--write"]) == 0
    assert "0 changed" in capsys.readouterr().out


def test_broken_files_are_named_and_others_go_on(tmp_path, capsys):
    (tmp_path / "a.py").write_text("def f(:\n")
    (tmp_path / "b.py").write_text("import torch.quantization\n")
    assert main(["migrate", str(tmp_path), "--write"]) == 3
    assert "a.py:1" in capsys.readouterr().err
    assert HERE in (tmp_path / "b.py").read_text()
    assert main(["migrate", str(tmp_path / "none.py")]) == 4


LISTINGS = Path(__file__).parents[2] / "examples" / "migration"


@pytest.mark.parametrize("name", sorted(p.name for p in (LISTINGS / "old").glob("*.py")))
def test_listings_are_what_the_command_makes(name):
    result = rewrite((LISTINGS / "old" / name).read_text("utf8"))
    assert result.notes == []
    assert result.code == (LISTINGS / name).read_text("utf8")

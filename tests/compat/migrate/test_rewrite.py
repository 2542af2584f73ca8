"""Programs on the four old interfaces, each in many spellings: rewritten, they run on integers without another edit."""

import importlib.util
import sys
import textwrap

import pytest
import torch

pytest.importorskip("libcst")
import pennyweight as pw
from pennyweight.compat.migrate import rewrite

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning"
)

EAGER = """
class Small({nn}.Module):
    '''Stubs around, as ever: torch.quantization wanted them.'''

    def __init__(self):
        super().__init__()
        self.quant = {q}QuantStub()
        self.conv = {nn}.Conv2d(3, 8, 3)
        self.bn = {nn}.BatchNorm2d(8)
        self.relu = {nn}.ReLU( )   # odd spacing
        self.sum = {f}FloatFunctional()
        self.fc = {nn}.Linear(8, 4)
        self.dequant = {q}DeQuantStub()

    def forward(self, x):
        x = self.relu(self.bn(self.conv(self.quant(x)))).mean((2, 3))
        return self.dequant(self.fc(self.sum.add(x, x)))


def build(seed):
    {torch}.manual_seed(seed)
    model = Small().train()
    model.qconfig = {q}get_default_qat_qconfig("fbgemm")
    model = {q}fuse_modules_qat(model, [["conv", "bn", "relu"]])
    model = {q}prepare_qat(model, inplace=True)
    for _ in range(3):
        model({torch}.randn(4, 3, 8, 8))
    return {q}convert(model.eval())   # integers


SHAPE = (2, 3, 8, 8)
"""
_EAGER_NAMES = """from torch.{ao}quantization import (
    QuantStub, DeQuantStub,  # the stubs
    get_default_qat_qconfig,
    # what is done to a model
    fuse_modules_qat, prepare_qat, convert,
)
"""
EAGER_SPELLINGS = {
    "through torch": ("import torch\nfrom torch import nn\n", "torch.quantization.", "torch.nn.quantized."),
    "through torch.ao": ("import torch\nfrom torch import nn\n", "torch.ao.quantization.", "torch.ao.nn.quantized."),
    "the module alone": (
        "import torch.quantization\nimport torch.nn.quantized\nfrom torch import nn\n", "torch.quantization.",
        "torch.nn.quantized.",
    ),
    "an alias": (
        "import torch\nimport torch.ao.quantization as tq, torch.nn.quantized as nnq\nfrom torch import nn\n", "tq.", "nnq.",
    ),
    "from torch": (
        "import torch\nfrom torch import (\n    nn,  # layers\n    quantization,  # integers\n)\n", "quantization.",
        "nn.quantized.",
    ),
    "from torch.ao": (
        "import torch\nfrom torch.ao import quantization as Q, nn as aonn\nimport torch.nn as nn\n", "Q.", "aonn.quantized.",
    ),
    "torch by another name": (
        "import torch as th, torch\nfrom torch import nn, ao\n", "th.ao.quantization.", "ao.nn.quantized.",
    ),
    "names": (
        (f"import torch\nfrom torch import nn\n{_EAGER_NAMES.format(ao='ao.')}"
        "from torch.ao.nn.quantized import FloatFunctional\n"), "", "",
    ),
    "old names": (
        f"import torch\n{_EAGER_NAMES.format(ao='')}from torch.nn.quantized import FloatFunctional\nfrom torch import nn\n",
        "", "",
    ),
    "star": (
        "import torch\nfrom torch import nn\nfrom torch.quantization import *\nfrom torch.nn.quantized import *\n", "", "",
    ),
    "either": (
        ("import torch\nfrom torch import nn\ntry:\n    import torch.ao.quantization as tq\n"
        "except ImportError:  # long ago\n    import torch.quantization as tq\n"), "tq.", "nn.quantized.",
    ),
    "a variable": ("import torch\nfrom torch import nn\ntq = torch.quantization\n", "tq.", "torch.nn.quantized."),
}  # fmt: skip

GRAPH = """
class Block(nn.Module):
    def __init__(self, stride=1):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, stride, 1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, 1, 1, bias=False), nn.BatchNorm2d(4)

    def forward(self, x):
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + x)


def build(seed):
    torch.manual_seed(seed)
    model = nn.Sequential(Block(), Block(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).train()
    mapping = {q}get_default_qat_qconfig_mapping("x86")  # or fbgemm
    example = torch.randn(2, 4, 6, 6)
    model = {fx}prepare_qat_fx(model, mapping, (example,))
    model(example)
    return {fx}convert_fx(model.eval())


SHAPE = (2, 4, 6, 6)
"""
GRAPH_SPELLINGS = {
    "chains": ("import torch\nfrom torch import nn\n", "torch.ao.quantization.", "torch.ao.quantization.quantize_fx."),
    "names": (
        ("import torch\nfrom torch import nn\nfrom torch.ao.quantization import get_default_qat_qconfig_mapping\n"
        "from torch.ao.quantization.quantize_fx import prepare_qat_fx, convert_fx\n"), "", "",
    ),
    "modules": (
        "import torch\nfrom torch import nn\nfrom torch.ao.quantization import quantize_fx, qconfig_mapping as m\n",
        "m.", "quantize_fx.",
    ),
    "an alias around": ("import torch\nfrom torch import nn\nimport torch.ao.quantization as tq\n", "tq.", "tq.quantize_fx."),
    "an old alias": (
        "import torch, torch.quantization.quantize_fx as qfx\nfrom torch import nn\nimport torch.quantization\n",
        "torch.quantization.", "qfx.",
    ),
}  # fmt: skip

EXPORTED = """
def build(seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    example = (torch.randn(5, 6),)
    graph = {capture}
    quantizer = {x}XNNPACKQuantizer()
    quantizer.set_global({x}get_symmetric_quantization_config())
    prepared = {p}prepare_pt2e(graph, quantizer)
    prepared(*example)
    return {p}convert_pt2e(prepared)


SHAPE = (5, 6)
"""
_X = "torch.ao.quantization.quantizer.xnnpack_quantizer"
_CAPTURE = "torch._export.capture_pre_autograd_graph(model, example)"
_TRAINING = "torch.export.export_for_training(model, example).module()"
EXPORTED_SPELLINGS = {
    "chains": ("import torch\nfrom torch import nn\n", _CAPTURE, f"{_X}.", "torch.ao.quantization.quantize_pt2e."),
    "names": (
        ("import torch\nfrom torch import nn\nfrom torch.export import Dim, export_for_training  # soon gone\n"
        "from torch.ao.quantization.quantize_pt2e import (\n  prepare_pt2e,\n  convert_pt2e)\n"
        f"from {_X} import XNNPACKQuantizer, get_symmetric_quantization_config\n"),
        "export_for_training(model, example).module()", "", "",
    ),
    "torchao and executorch": (
        ("import torch\nfrom torch import nn\nimport torchao.quantization.pt2e.quantize_pt2e as qp\n"
        "from executorch.backends.xnnpack.quantizer import xnnpack_quantizer as xq\n"), _TRAINING, "xq.", "qp.",
    ),
    "a package of quantizers": (
        ("import torch\nfrom torch import nn\nfrom torch._export import capture_pre_autograd_graph as capture\n"
        "from torch.ao.quantization import quantizer as Z, quantize_pt2e\n"),
        "capture(model, example)", "Z.xnnpack_quantizer.", "quantize_pt2e.",
    ),
}  # fmt: skip

LANGUAGE = """
def build(seed):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(32, 32, bias=False), torch.nn.Linear(32, 8, bias=False))
    quantizer = {qat}Int8DynActInt4WeightQATQuantizer(groupsize=32)
    model = quantizer.prepare(model)
    model(torch.randn(2, 32)).sum().backward()
    return quantizer.convert(model)


SHAPE = (2, 32)
"""
LANGUAGE_SPELLINGS = {
    "prototype": (
        "import torch\nfrom torchao.quantization.prototype.qat import Int8DynActInt4WeightQATQuantizer\n", "",
    ),
    "present": ("import torch\nfrom torchao.quantization.qat import Int8DynActInt4WeightQATQuantizer\n", ""),
    "chains": ("import torch\nimport torchao\n", "torchao.quantization.qat."),
    "an alias around": (
        "import torch\nimport torchao.quantization as tq\n", "tq.prototype.qat.",
    ),
    "a module": ("import torch\nfrom torchao.quantization.prototype import qat as old\n", "old."),
}  # fmt: skip

PROGRAMS = {
    **{
        f"eager, {name}": head + EAGER.format(q=q, f=f, nn="nn", torch="torch")
        for name, (head, q, f) in EAGER_SPELLINGS.items()
    },
    **{f"fx, {name}": head + GRAPH.format(q=q, fx=fx) for name, (head, q, fx) in GRAPH_SPELLINGS.items()},
    **{
        f"pt2e, {name}": head + EXPORTED.format(capture=c, x=x, p=p)
        for name, (head, c, x, p) in EXPORTED_SPELLINGS.items()
    },
    **{f"torchao, {name}": head + LANGUAGE.format(qat=q) for name, (head, q) in LANGUAGE_SPELLINGS.items()},
}


@pytest.fixture
def load(tmp_path):
    """Import a text as a module."""
    made = []

    def call(code):
        path = tmp_path / f"migrated{len(made)}.py"
        path.write_text(code)
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = module  # the exporter looks a forward's globals up there
        made.append(path.stem)
        spec.loader.exec_module(module)
        return module

    yield call
    for name in made:
        del sys.modules[name]


def codes(model):
    """The integers of a converted model, by name."""
    return {n: t for n, t in model.state_dict().items() if t.dtype in (torch.int8, torch.uint8)}


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_spelling_runs_on_integers(name, load):
    result = rewrite(PROGRAMS[name])
    assert result.notes == []
    assert rewrite(result.code) == result
    module = load(result.code)
    model = module.build(0)
    assert codes(model)
    first = next(n for n in PROGRAMS if n.split(",")[0] == name.split(",")[0])
    same = load(rewrite(PROGRAMS[first]).code).build(0)
    x = torch.randn(module.SHAPE, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(model(x), same(x))  # whichever way it was spelled


@pytest.mark.parametrize("name", PROGRAMS)
def test_lines_without_old_names_stay_byte_for_byte(name):
    old, new = PROGRAMS[name].split("\n"), rewrite(PROGRAMS[name]).code.split("\n")
    names = ("torch.", "torchao.", "th.", "import", "nn.", "tq.")
    old = old[next(i for i, line in enumerate(old) if line[:5] in ("class", "def b")) :]  # behind the imports
    kept = [line for line in old if not any(n in line for n in names) or "'''" in line]
    rest = iter(new)
    assert len(kept) > 5
    assert all(line in rest for line in kept)  # all there, in the same order


def test_setting_the_engine_names_the_backend(load):
    code = (
        "import torch\nfrom torch.backends import quantized as eng\n\n"
        "torch.backends.quantized.engine = 'qnnpack'  # phones\neng.engine = torch.__name__ and 'x86'\n"
    )
    result = rewrite(code)
    assert "\npennyweight.compat.quantization.set_backend('qnnpack')  # phones\n" in result.code
    assert "\npennyweight.compat.quantization.set_backend(torch.__name__ and 'x86')\n" in result.code
    assert result.notes == []
    before = torch.backends.quantized.engine
    load(result.code)
    assert torch.backends.quantized.engine == before
    with pytest.raises(pw.PennyweightError, match="backend 'abacus' is unknown"):
        load(rewrite("import torch\ntorch.backends.quantized.engine = 'abacus'\n").code)


NOTED = {
    "e = torch.backends.quantized.engine": ("instruction set", "get_default_qconfig"),
    "a = torch.backends.quantized.engine = 'x86'": ("instruction set", "get_default_qconfig"),
    "torch.jit.script(model)": ("no TorchScript form", "pw.save(model, 'model.dwt')"),
    "torch.jit.save(s, 'm.pt')": ("no TorchScript form", "pw.save(model, 'model.dwt')"),
    "s._save_for_lite_interpreter('m.ptl')": ("no TorchScript form", "pw.save"),
    "torch.onnx.export(model, x, 'm.onnx')": ("does not know the integer operations", "pw.save"),
    "torch.quantize_per_tensor(x, 0.1, 0, torch.quint8)": ("giving up tensors of quantized dtypes", "pw.QTensor"),
    "w = model.fc.weight().int_repr()": ("giving up tensors of quantized dtypes", "pw.QTensor"),
    "torch.ops.quantized.linear(x, w, 1.0, 0)": ("operations of this package", "quantize the module"),
    "torch._inductor.config.freezing = True": ("inductor's int8 lowering", "Leave it out"),
    "tq.get_default_static_quant_module_mappings()": ("has no 'get_default_static", "pw.Rule(types=...)"),
    "tq.get_default_qconfig_maping('x86')": ("has no", "'get_default_qconfig_mapping'"),
    "tq.fx.graph_module.ObservedGraphModule": ("has no 'graph_module'", "pw.record(model, example)"),
    "isinstance(m, torch.ao.nn.quantized.dynamic.Linear)": ("has no 'dynamic'", "pw.journal(model)"),
    "q = importlib.import_module('torch.ao.quantization.observer')": (
        "a text is not rewritten", "'pennyweight.compat.quantization.observer'",
    ),
    "def f(c: 'torch.ao.quantization.QConfig | None'): ...": (
        "a text is not rewritten", "'pennyweight.compat.quantization.QConfig'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("line", NOTED)
def test_what_cannot_be_carried_over_says_why_and_what_instead(line):
    old = f"import importlib\nimport torch\nimport torch.ao.quantization as tq\n\n{line}\n"
    result = rewrite(old)
    why, instead = NOTED[line]
    (note,) = result.notes
    assert note.line == 5
    assert why in note.why
    assert instead in note.instead
    assert note.now == result.code.count("\n")  # the last line, wherever that is now
    again = rewrite(result.code)
    assert again.code == result.code
    assert [n.now for n in again.notes] == [note.now]  # still named, at the line where it now is


def test_ordinary_torch_is_nobodys_business():
    code = textwrap.dedent(
        """
        import torch
        from torch import jit

        def f(m, x):  # mentions torch.quantization
            '''Uses no torch.quantization at all.'''
            print("see torch.quantization for more")
            return torch.compile(jit.script(m)), torch.onnx.export(m, x), m.int_repr(), torch.qint8
        """
    )
    result = rewrite(code)
    assert result.code == code
    assert result.notes == []


def test_compile_is_named_where_the_inductor_was_meant():
    code = "import torch\nfrom torch.ao.quantization.quantizer{} import {}\nm = torch.compile(m)\n"
    plain = rewrite(code.format(".xnnpack_quantizer", "XNNPACKQuantizer"))
    inductor = rewrite(code.format(".x86_inductor_quantizer", "X86InductorQuantizer"))
    assert plain.notes == []
    assert [(n.line, n.what) for n in inductor.notes] == [(3, "torch.compile")]

"""Names by scope: what a chain stands for, where the import that it needs goes, and what stays bound."""

import pytest

pytest.importorskip("libcst")
from hypothesis import given, settings
from hypothesis import strategies as st

from pennyweight.compat.migrate import rewrite

C = "pennyweight.compat"


def both(text):
    """Old and new text from lines marked `-` and `+` in the ninth column; the others are in both."""
    lines = [line[8:] for line in text.replace("§", C).split("\n")[1:-1]]
    old = [line[1:] for line in lines if line[:1] != "+"]
    new = [line[1:] for line in lines if line[:1] != "-"]
    return "\n".join(old) + "\n", "\n".join(new) + "\n"


CASES = {
    "after docstring, future and comments": """
         #!/usr/bin/env python
         '''What it does.'''
         from __future__ import annotations

        +import §.quantization
         import torch

        -x = torch.quantization.QuantStub()
        +x = §.quantization.QuantStub()
        """,
    "inside of the function that imports torch": """
         import os

         def f(m):
        +    import §.quantization.quantize_fx
             import torch
        -    return torch.ao.quantization.quantize_fx.fuse_fx(m), torch.ones(1)
        +    return §.quantization.quantize_fx.fuse_fx(m), torch.ones(1)
        """,
    "inside of a try": """
         try:
        +    import §.quantization
             import torch
         except ImportError:
             torch = None
        -stub = torch.quantization.QuantStub
        +stub = §.quantization.QuantStub
        """,
    "torch stays bound in its function": """
         def g():
             import torch
             return torch.ones(1)

         def f(m):
        -    import torch.quantization
        -    return torch.quantization.prepare(m), torch.ones(1)
        +    import torch
        +    import §.quantization
        +    return §.quantization.prepare(m), torch.ones(1)
        """,
    "torch outside of the function is enough": """
         import torch

         def f(m):
        -    import torch.quantization
        -    return torch.quantization.prepare(m), torch.ones(1)
        +    import §.quantization
        +    return §.quantization.prepare(m), torch.ones(1)
        """,
    "torch imported later is enough": """
        -import torch.quantization
        +import §.quantization
         import torch
         x = torch.ones(1)
        """,
    "torch in one branch only": """
         if fast:
             import torch
         else:
        -    import torch.quantization
        +    import torch
        +    import §.quantization
         x = torch.ones(1)
        """,
    "torch used before its import": """
         def f():
             return torch.ones(1)

        -import torch.ao.quantization
        +import torch
        +import §.quantization
        """,
    "torch not used": """
        -import torch.quantization, os
        -x = torch.quantization.QuantStub()
        +import §.quantization, os
        +x = §.quantization.QuantStub()
        """,
    "several on a line": """
        -import torch; import torch.quantization; x = torch.quantization.QuantStub()
        +import torch; import §.quantization; x = §.quantization.QuantStub()
        """,
    "a body on the line of its head": """
        -if True: import torch.quantization; torch.ones(1)
        +if True: import torch; import §.quantization; torch.ones(1)
        """,
    "a parameter of the name": """
         import torch

         def f(torch, quantization=1):
             return torch.quantization.prepare, lambda torch: torch.quantization
        """,
    "a local of the name": """
         from torch import nn

         def f():
             nn = object()
             return nn.quantized.FloatFunctional()
        """,
    "keywords, attributes and definitions of the name": """
        -from torch import quantization
        +from § import quantization

         class Net:
             quantization = None

             def prepare(self, torch=1):
                 return self.torch.quantization.prepare(torch=2, quantization=3), self.x().quantization
        """,
    "defaults and decorators see the outside": """
        +import §.quantization
         import torch

        -@torch.quantization.prepare
        -def f(torch=torch.quantization.default_qconfig):
        +@§.quantization.prepare
        +def f(torch=§.quantization.default_qconfig):
             return torch.quantization
        """,
    "comprehensions and f-strings": """
        +import §.quantization
         import torch
        -x = [f"{torch.quantization.QuantStub():>9}" for torch in (torch.quantization,)]
        +x = [f"{torch.quantization.QuantStub():>9}" for torch in (§.quantization,)]
        """,
    "a patch of a module": """
        +import §.quantization
         import torch
        -torch.quantization.prepare = print
        +§.quantization.prepare = print
        """,
    "dots over several lines": """
        +import §.quantization
         import torch
        -x = (torch
        +x = (§
             .quantization  # here
             .prepare(  # there
                 m))
        """,
    "each import once": """
        +import §.quantization.quantize_fx
         import torch
        +import §.nn.quantized
         from torch import nn
        -a = torch.quantization.prepare, torch.ao.quantization.prepare, torch.quantization.quantize_fx.fuse_fx
        -b = nn.quantized.FloatFunctional, torch.nn.quantized.FloatFunctional, torch.ao.nn.quantized.FloatFunctional
        +a = §.quantization.prepare, §.quantization.prepare, §.quantization.quantize_fx.fuse_fx
        +b = §.nn.quantized.FloatFunctional, §.nn.quantized.FloatFunctional, §.nn.quantized.FloatFunctional
        """,
    "an import that is there": """
        -import torch.quantization
        +import §.quantization
         import torch

         def f(m):
        -    return torch.ao.quantization.prepare(m)
        +    return §.quantization.prepare(m)
        """,
    "another name of the module": """
        -from torchao.quantization import pt2e
        -pt2e.prepare_pt2e, pt2e.quantizer.Quantizer
        +import §.quantization.quantizer
        +from § import quantization as pt2e
        +pt2e.prepare_pt2e, pt2e.quantizer.Quantizer
        """,
    "packages that may be gone": """
        -import torchao as ao
        -ao.quantize_(m)
        +import §.torchao.quantization
        +§.torchao.quantization.quantize_(m)
        """,
    "packages that are still used": """
        +import §.torchao.quantization
         import torchao
        -torchao.quantize_(m, torchao.float8.Float8LinearConfig())
        +§.torchao.quantization.quantize_(m, torchao.float8.Float8LinearConfig())
        """,
    "relative imports of the name": """
         from . import quantization
         from .torch import quantization as q
         from ..torch.quantization import prepare
        """,
    "names that only begin alike": """
         import torch.quantization_tools
         from torch.exporting import export_for_training
         x = torch.quantization_tools.prepare
        """,
}


@pytest.mark.parametrize("name", CASES)
def test_scopes(name):
    old, new = both(CASES[name])
    assert (old != new) == ("        +" in CASES[name])
    result = rewrite(old)
    assert result.code == new
    assert rewrite(result.code).code == new
    compile(result.code, name, "exec")


LINES = (
    "import torch", "import torch.quantization", "import torch.ao.quantization as tq", "import torch.nn as nn",
    "from torch import nn, quantization", "from torch.ao import quantization  # a comment", "import torchao, os",
    "from torch.export import (  # why\n{i}    Dim,\n{i}    export_for_training,  # this\n{i})",
    "from torch.ao.quantization import prepare, convert as c", "x = torch.quantization.QuantStub()",
    "y = torch.ones(1); z = nn.quantized.FloatFunctional()", "quantization.quantize_fx.fuse_fx(torch)", "torch = None",
    "tq.observer.MinMaxObserver( )", "torch.backends.quantized.engine = 'x86'", "torchao.quantize_(m)  # all of it",
    "w = torch._export.capture_pre_autograd_graph(m, a)", "torch.jit.script(c(m))", "", "# torch.quantization",
)  # fmt: skip
HEADS = ("def f(torch):", "def g(m):", "class K:", "if x:", "try:", "for torch in m:", "with torch.no_grad() as nn:")


@st.composite
def programs(draw, depth=0):
    """Lines of every kind, nested at random."""
    indent = "    " * depth
    lines = []
    for _ in range(draw(st.integers(1, 6))):
        if depth < 3 and draw(st.integers(0, 4)) == 0:
            head = draw(st.sampled_from(HEADS))
            lines += [indent + head, *draw(programs(depth + 1)), f"{indent}    pass"]
            lines += [f"{indent}finally:", f"{indent}    pass"] if head == "try:" else []
        else:
            lines.append(indent + draw(st.sampled_from(LINES)).format(i=indent))
    return lines


@settings(max_examples=60, deadline=None)
@given(programs(), st.sampled_from(["\n", "\r\n"]), st.booleans())
def test_any_program_stays_a_program_and_a_second_run_changes_nothing(lines, newline, ended):
    code = ("\n".join(lines) + "\n" * ended).replace("\n", newline)
    result = rewrite(code)
    compile(result.code, "new", "exec")
    assert rewrite(result.code).code == result.code
    assert result.code.count("#") == code.count("#")  # no comment lost, none doubled
    assert result.code.endswith(newline) == code.endswith(newline)
    if newline not in code:
        return  # one line, which says nothing about the ends of lines
    if newline == "\r\n":
        assert result.code.count("\n") == result.code.count("\r\n")
    else:
        assert "\r" not in result.code
    shifted = rewrite(f"import os{newline}{code}").notes
    assert [(n.line - 1, n.now - 1, n.what) for n in shifted] == [(n.line, n.now, n.what) for n in result.notes]

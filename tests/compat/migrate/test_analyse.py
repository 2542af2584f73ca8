"""Names by scope: what a chain stands for, where the import that it needs goes, and what stays bound."""

import builtins

import pytest

pytest.importorskip("libcst")
from hypothesis import given, settings
from hypothesis import strategies as st

from pennyweight.compat.migrate import rewrite
from pennyweight.compat.migrate.names import module_of
from pennyweight.compat.migrate.rules import SETTERS, moved

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
    "an import in either branch": """
         if fast:
        +    import §.nn.quantized
             import torch.nn as nn
         else:
        +    import §.nn.quantized
             from torch import nn
        -x = nn.quantized.FloatFunctional()
        +x = §.nn.quantized.FloatFunctional()
        """,
    "a class sees the outside before its own import": """
        +import §.quantization
         import torch

         class K:
        -    x = torch.quantization.QuantStub()
        +    x = §.quantization.QuantStub()
             import torch
        """,
    "a name that an import further down makes local": """
         import torch.nn
        -import torch.quantization
        +import §.quantization

         def f(m):
        +    import §.quantization
             import torch
        -    m = torch.quantization.prepare(m)
        -    import torch.quantization
        +    m = §.quantization.prepare(m)
        +    import §.quantization
             return torch.nn.Sequential(m)
        """,
    "a parameter that an import replaces": """
         import torch

         def f(torch=None):
        -    import torch.quantization
        +    import torch
        +    import §.quantization
             return torch.ones(1)
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
    "an import over a parameter, under another import": """
        -import torch.quantization
        +import torch
        +import §.quantization
         import torch.nn as nn
         nn.quantize(torch.ones(1))

         def f(torch):
        -    import torch.quantization
        +    import torch
        +    import §.quantization
             return torch.quantization.QuantStub()
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


def test_a_name_of_several_values_is_left_and_named():
    code = "import torch\nfor torch in (torch.nn, m):\n    torch.quantization.prepare(m)\n"
    result = rewrite(code)
    assert result.code == code
    assert [(n.line, n.why) for n in result.notes] == [(3, "'torch' is given other values here, too")]


def test_a_name_made_local_further_down_is_named():
    code = "from torch import nn\ndef f():\n    x = nn.quantized.FloatFunctional()\n    import torch.quantization\n"
    (note,) = rewrite(code).notes
    assert (note.line, note.instead) == (3, "Move that import up.")


LINES = (
    "import torch", "import torch.quantization", "import torch.ao.quantization as tq", "import torch.nn as nn",
    "from torch import nn, quantization", "from torch.ao import quantization  # a comment", "import torchao, os",
    "from torch.export import (  # why\n{i}    Dim,\n{i}    export_for_training,  # this\n{i})",
    "from torch.ao.quantization import prepare, convert as c", "x = torch.quantization.QuantStub()",
    "y = torch.ones(1); z = nn.quantized.FloatFunctional()", "quantization.quantize_fx.fuse_fx(torch)",
    "tq.observer.MinMaxObserver( )", "import torch as t, torch.ao", "t.ao.quantization.quantizer.Quantizer(prepare)",
    "import torch.quantization.quantize_fx", "use(torch.quantization.quantize_fx, torch, nn)", "torch.backends.quantized.engine = 'x86'", "torchao.quantize_(m)  # all of it",
    "w = torch._export.capture_pre_autograd_graph(m, a)", "torch.jit.script(c(m))", "", "# torch.quantization",
)  # fmt: skip
HEADS = {
    "def f(torch):": ("f(m)",), "def g(a):": ("g(m)",), "if x:": (), "if not x:": (), "for item in m:": (),
    "try:": ("finally:", "    pass"), "with torch.no_grad() as nn:": (),
}  # fmt: skip


@st.composite
def programs(draw, depth=0):
    """Lines of every kind, nested at random."""
    indent = "    " * depth
    lines = []
    for _ in range(draw(st.integers(1, 6))):
        if depth < 3 and draw(st.integers(0, 4)) == 0:
            head = draw(st.sampled_from(sorted(HEADS)))
            lines += [indent + head, *draw(programs(depth + 1)), f"{indent}    pass"]
            lines += [indent + line for line in HEADS[head]]
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
    assert [(n.line - 1, n.now - 1, n.what) for n in shifted] == [
        (n.line, n.now, n.what) for n in result.notes
    ]


class Thing:
    """A module, or what is in it or made of it; knows its name, and tells the world what is done to it."""

    def __init__(self, world, name):
        vars(self).update(_world=world, _name=name)

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return self._world.get(f"{self._name}.{name}")

    def __setattr__(self, name, value):
        self._world.seen.append((SETTERS[f"{self._name}.{name}"], (value,)))

    def __call__(self, *args):
        self._world.seen.append((self._world.canonical(self), tuple(map(self._world.canonical, args))))
        return Thing(self._world, f"({self._world.canonical(self)})")

    def __iter__(self):
        yield Thing(self._world, f"{self._name}[0]")

    def __enter__(self):
        return self._world.get(f"{self._name}.enter")

    def __exit__(self, *_):
        return None


class World:
    """Packages in which every name exists; but modules of ours are there only after they were imported."""

    def __init__(self):
        self.seen, self.loaded = [], set()

    def canonical(self, thing):
        return (moved(thing._name) or thing._name) if isinstance(thing, Thing) else thing

    def get(self, name):
        if name.startswith("pennyweight.") and module_of(name) == name and name not in self.loaded:
            raise AttributeError(f"{name} was not imported")
        return Thing(self, name)

    def load(self, name):
        if name.split(".")[0] == "pennyweight":
            assert module_of(name) == name, f"{name} is no module"
            self.loaded |= {name.rsplit(".", n)[0] for n in range(name.count(".") + 1)}

    def bring(self, name, within=None, local=None, fromlist=(), level=0):
        self.load(name)
        for inner in fromlist or ():
            if name.startswith("pennyweight") and module_of(f"{name}.{inner}") == f"{name}.{inner}":
                self.load(f"{name}.{inner}")
        return Thing(self, name if fromlist else name.split(".")[0])

    def run(self, code):
        """What was called with what, and the error that ended it."""
        names = {n: Thing(self, n) for n in ("m", "a", "x", "use")}
        inside = {
            "__import__": self.bring,
            "__build_class__": builtins.__build_class__,
            "__name__": "w",
            **names,
        }
        try:
            exec(compile(code, "program", "exec"), {"__builtins__": inside})
        except Exception as error:
            return self.seen, error
        return self.seen, None


IMPORTS = [line for line in LINES if "import" in line and "{" not in line]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(IMPORTS), min_size=3, unique=True), programs())
def test_any_program_does_what_it_did(imports, lines):
    code = "\n".join([*imports, *lines]) + "\n"
    result = rewrite(code)
    old, error = World().run(code)
    new, now = World().run(result.code)
    if any("further down" in n.why for n in result.notes):
        return  # named
    assert new[: len(old)] == old
    if error is None:
        assert now is None, f"{now!r} in\n{result.code}"
        assert new == old


def test_a_name_made_local_by_an_import_that_another_use_needs():
    result = rewrite(
        "import torchao\n\n\ndef f(m, a):\n    torchao.quantize_(m)\n    import torch\n"
        "    return torch._export.capture_pre_autograd_graph(m, a)\n"
    )
    assert "import pennyweight.compat.export\n    import torch" in result.code
    assert [(n.line, n.what) for n in result.notes if "further down" in n.why] == [(5, "torchao.quantize_")]

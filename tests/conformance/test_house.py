"""What the house promises about itself: imports point one way, everything public is documented, files stay readable."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src" / "pennyweight"
FILES = sorted(SOURCE.rglob("*.py"))
LAYERS = (  # each imports from those before it; within a row, from none of the others
    ("errors",), ("registry", "journal", "atomic", "progress", "measure"), ("spec",), ("formats",), ("qtensor",),
    ("stats",), ("ranges",), ("solvers",), ("gradients",), ("graph",), ("plan",), ("nn",), ("reconstruction",), ("passes",), ("recipe",), ("program",),
    ("runtime",), ("kernels", "exporters"), ("pipeline",), ("modules",), ("storage",), ("profiling", "compiled", "synthesis"), ("keep_slow", "tune"), ("training",), ("llm",), ("diagnose",), ("report",), ("demo",), ("compat",), ("cli",),
)  # fmt: skip
RANK = {name: i for i, row in enumerate(LAYERS) for name in row}


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path, *, everywhere: bool = False) -> list[tuple[str, int]]:
    """Modules that a file imports when it is loaded (or anywhere in it), with the lines. TYPE_CHECKING blocks and what
    functions import when called make no cycle at load time."""
    found: list[tuple[str, int]] = []

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.ImportFrom):
            base = node.module or ""
            found.append((base, node.lineno))
            found.extend((f"{base}.{a.name}", node.lineno) for a in node.names)
        elif isinstance(node, ast.Import):
            found.extend((a.name, node.lineno) for a in node.names)
        late = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not everywhere
        if late or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)):
            return
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text("utf8")))
    return found


def test_every_file_has_a_layer():
    tops = {name_of(p).split(".")[0] for p in FILES} - {"__init__", ""}
    assert tops == set(RANK)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_point_one_way(path):
    me = name_of(path).split(".")[0]
    if me in ("", "__init__"):
        return
    for module, line in imports(path):
        parts = module.split(".")
        if parts[0] != "pennyweight" or len(parts) < 2 or parts[1] not in RANK or parts[1] == me:
            continue
        assert RANK[parts[1]] < RANK[me], f"{name_of(path)}:{line} imports {module}"


def test_left_of_the_graph_nothing_knows_modules():
    for path in FILES:
        me = name_of(path).split(".")[0]
        if RANK.get(me, 99) < RANK["graph"]:
            seen = [m for m, _ in imports(path, everywhere=True)]
            assert not [m for m in seen if m.startswith("torch.nn")], name_of(path)


def test_runtime_and_program_do_without_torch():
    for path in FILES:
        name = name_of(path)
        if name.startswith(("runtime", "program")) and not name.startswith("program.lower"):
            seen = [m for m, _ in imports(path, everywhere=True)]
            assert not [m for m in seen if m.split(".")[0] == "torch"], name


def test_a_process_that_runs_a_model_never_loads_torch(zoo, tmp_path):
    from pennyweight.exporters.dwt import write_dwt

    write_dwt(zoo, tmp_path / "zoo.dwt")
    code = (
        "import sys, pennyweight.runtime as r; "
        f"s = r.load({str(tmp_path / 'zoo.dwt')!r}, threads=1); s.engine; "
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def documented(path: Path) -> list[str]:
    """Public things of a file without a docstring."""
    tree = ast.parse(path.read_text("utf8"))
    missing = [] if ast.get_docstring(tree) else ["the module"]

    def visit(node: ast.AST, inside: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef | ast.FunctionDef):
                if child.name.startswith("_"):
                    continue
                overload = any("overload" in ast.dump(d) for d in child.decorator_list)
                if not ast.get_docstring(child) and not overload:
                    missing.append(f"{inside}{child.name}, line {child.lineno}")
                if isinstance(child, ast.ClassDef):
                    visit(child, f"{child.name}.")

    visit(tree, "")
    return missing


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_everything_public_says_what_it_is(path):
    assert documented(path) == []


def test_verbs_say_what_they_raise():
    silent = []
    for file in ("pipeline.py", "storage.py", "profiling.py", "recipe.py", "plan.py", "modules.py"):
        for node in ast.walk(ast.parse((SOURCE / file).read_text("utf8"))):
            if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
                continue
            raised = [n for n in ast.walk(node) if isinstance(n, ast.Raise) and n.exc is not None]
            if raised and not re.search(r"Raises", ast.get_docstring(node) or ""):
                silent.append(f"{file}:{node.name}")
    assert silent == []


def tracked() -> list[Path]:
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("this is no git checkout")
    kinds = {".py", ".cpp", ".h", ".inc", ".md", ".toml", ".txt", ".cmake", ""}
    return [ROOT / n for n in done.stdout.splitlines() if Path(n).suffix in kinds and (ROOT / n).is_file()]


def test_files_can_be_read_at_a_sitting():
    long = {
        str(p.relative_to(ROOT)): n
        for p in tracked()
        if p.suffix in (".py", ".cpp", ".h") and (n := len(p.read_text("utf8").splitlines())) > 520
    }
    assert long == {}
    assert not [p for p in tracked() if p.stem in ("utils", "helpers", "misc", "common")]


def test_nothing_unfinished_and_no_places_of_one_machine():
    marks = re.compile("|".join([r"\bTO" + "DO\\b", r"\bFIX" + "ME\\b", r"\bXX" + "X\\b"]))
    places = re.compile(r"(?<![\w.])/(?:work|root|home|tmp)/\w")
    found = []
    for path in tracked():
        for i, line in enumerate(path.read_text("utf8").splitlines(), 1):
            if marks.search(line) or places.search(line):
                found.append(f"{path.relative_to(ROOT)}:{i}: {line.strip()[:80]}")
    assert found == []

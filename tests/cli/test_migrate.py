"""`migrate`: folders, patches, line ends and encodings, links and modes; what is broken is named and stays."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("libcst")

OLD = "import torch\nx = torch.quantization.QuantStub()\n"
NEW = (
    "import pennyweight.compat.quantization\nimport torch\nx = pennyweight.compat.quantization.QuantStub()\n"
)


def written(path):
    """What writing changes of a file, and reading does not."""
    found = path.stat()
    return found.st_mtime_ns, found.st_ino, path.read_bytes()


def test_nothing_is_written_without_being_asked(run, folder):
    Path("a.py").write_text(OLD)
    before = written(Path("a.py"))
    code, out, err = run("migrate", "a.py")
    assert (code, err) == (0, "")
    assert out.startswith(
        "--- a.py\n+++ a.py\n@@ -1,2 +1,3 @@\n+import pennyweight.compat.quantization\n import torch\n-x ="
    )
    assert out.endswith("1 files read, 1 to change (--write does it), 0 lines not carried over\n")
    assert written(Path("a.py")) == before


def test_a_second_run_and_other_files_are_left_untouched(run, folder):
    Path("a.py").write_text(OLD)
    Path("plain.py").write_text("import os, sys\nx=1")
    assert run("migrate", ".", "--write")[0] == 0
    assert Path("a.py").read_text() == NEW
    assert Path("plain.py").read_text() == "import os, sys\nx=1"
    before = [written(p) for p in sorted(Path().iterdir())]
    code, out, _ = run("migrate", ".", "--write")
    assert code == 0
    assert out == "3 files read, 0 changed, 0 lines not carried over\n"
    assert [written(p) for p in sorted(Path().iterdir())] == before


@pytest.mark.parametrize(
    "end",
    [
        "",
        "\n",
        "\nx = torch.quantization.QuantStub()",
        "\r\nimport torch.nn.quantized\r\n",
        "\n\x0c\n# \u2028\n",
    ],
)
def test_what_is_shown_is_a_patch(run, folder, end):
    git = shutil.which("git")
    if git is None:
        pytest.skip("git is not here")
    Path("in").mkdir()
    for name in ("a.py", "b.py"):
        Path("in", name).write_bytes((OLD + "torch.jit.script(x)\n" + name[0] + " = 1" + end).encode())
    shutil.copytree("in", "by_git/in")
    _, out, _ = run("migrate", "in")
    Path("by_git/all.patch").write_bytes(out.encode())
    assert out.count(": not carried over: torch.jit.script: ") == 2
    done = subprocess.run(
        [git, "apply", "-p0", "all.patch"], cwd="by_git", capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    run("migrate", "in", "--write")
    for name in ("a.py", "b.py"):
        assert Path("by_git/in", name).read_bytes() == Path("in", name).read_bytes()


@pytest.mark.parametrize(
    ("encoding", "head"),
    [
        ("utf-8", ""),
        ("utf-8-sig", ""),
        ("latin-1", "# -*- coding: latin-1 -*-\r\n"),
        ("cp1252", "#!/bin/x\n# coding: cp1252\n"),
    ],
)
def test_bytes_outside_of_the_change_stay(run, folder, encoding, head):
    text = f"{head}import torch.quantization as tq  # caf\u00e9\r\nd = '\u00fc'\n\tif_ = 1\n".replace(
        "\tif_", "if_"
    )
    Path("a.py").write_bytes(text.encode(encoding))
    assert run("migrate", "a.py", "--write")[0] == 0
    expected = text.replace("torch.quantization", "pennyweight.compat.quantization").encode(encoding)
    assert Path("a.py").read_bytes() == expected


def test_links_and_modes_stay(run, folder):
    Path("real.py").write_text(OLD)
    Path("real.py").chmod(0o750)
    Path("link.py").symlink_to("real.py")
    assert run("migrate", "link.py", "--write")[0] == 0
    assert Path("link.py").is_symlink()
    assert Path("real.py").read_text() == NEW
    assert Path("real.py").stat().st_mode & 0o777 == 0o750


def test_code_of_others_in_a_folder_is_left_alone(run_json, folder):
    places = [
        "a.py",
        "pkg/b.py",
        ".hidden/c.py",
        "env/lib/d.py",
        "lib/site-packages/e.py",
        "__pycache__/f.py",
        "g.txt",
    ]
    for place in places:
        Path(place).parent.mkdir(parents=True, exist_ok=True)
        Path(place).write_text(OLD)
    Path("env/pyvenv.cfg").write_text("home = x\n")
    assert run_json("migrate", ".", "--write")["changed"] == ["a.py", "pkg/b.py"]
    assert [p for p in places if Path(p).read_text() == OLD] == places[2:]
    assert run_json("migrate", "env/lib", ".hidden/c.py")["changed"] == [
        "env/lib/d.py",
        ".hidden/c.py",
    ]  # asked for


def test_lines_are_those_of_the_file_as_it_stands(run_json, folder):
    Path("a.py").write_text(OLD + "\n\ntorch.jit.script(x)\n")
    for flags, line in ((), 5), (("--write",), 6), ((), 6):
        result = run_json("migrate", "a.py", *flags)
        (note,) = result["notes"]
        assert (note["file"], note["line"], note["what"]) == ("a.py", line, "torch.jit.script")
        assert "pw.save" in note["instead"]
        assert Path("a.py").read_text().split("\n")[line - 1] == "torch.jit.script(x)"


BROKEN = {
    "syntax.py": (b"x = 1\ndef f(:\n    pass\n", "syntax.py:2:"),
    "indent.py": (b"if x:\npass\n", "indent.py:2:"),
    "bytes.py": (b"import torch\nx = '\xff'\n", "bytes.py: "),
    "cookie.py": (b"# coding: klingon\nx = 1\n", "cookie.py: "),
    "nul.py": (b"x = 1\0\n", "nul.py"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_named_and_the_others_go_on(run, folder, name):
    raw, where = BROKEN[name]
    Path(name).write_bytes(raw)
    for other in ("a.py", "z.py"):
        Path(other).write_text(OLD)
    code, out, err = run("migrate", ".", "--write")
    assert code == 3
    first, last = err.splitlines()
    assert first.startswith(where)
    assert first.endswith(" (left as it is)")
    assert last.startswith("error: 1 of 4 files could not be read")
    assert "4 files read, 2 changed" in out
    assert Path(name).read_bytes() == raw
    assert Path("a.py").read_text() == Path("z.py").read_text() == NEW


def test_a_failed_write_leaves_the_file(run, folder, monkeypatch):
    Path("a.py").write_text(OLD)

    def fail(descriptor):
        raise OSError("the disk is full")

    monkeypatch.setattr(os, "fsync", fail)
    code, _, err = run("migrate", "a.py", "--write")
    assert code == 4
    assert "the disk is full" in err
    assert Path("a.py").read_text() == OLD
    assert [p.name for p in Path().iterdir() if "tmp" in p.name] == []


def test_refusals(run, folder):
    Path("a.ipynb").write_text(json.dumps({"cells": []}))
    code, _, err = run("migrate", "a.ipynb")
    assert code == 3
    assert "a notebook is no Python file · at a.ipynb. Save it as a script first." in err
    code, _, err = run("migrate", "nowhere")
    assert code == 4
    assert "there is no file or folder 'nowhere'" in err
    assert run("migrate")[0] == 2


def test_without_libcst_the_extra_is_named(run, folder, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "libcst", None)
    Path("a.py").write_text(OLD)
    code, _, err = run("migrate", "a.py")
    assert code == 4
    assert "pip install 'pennyweight[migrate]'" in err

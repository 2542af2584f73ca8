"""The public names: there, documented, lazy, and never hidden by a submodule."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import pennyweight as pw


@pytest.mark.parametrize("name", pw.__all__)
def test_every_name_is_there_and_documented(name):
    assert (getattr(pw, name).__doc__ or "").strip()
    assert name in dir(pw)


def test_unknown_names():
    with pytest.raises(AttributeError, match="Did you mean 'quantize'"):
        pw.quantise  # noqa: B018


def test_submodules_do_not_hide_functions():
    importlib.import_module("pennyweight.journal")
    assert callable(pw.journal)
    assert callable(pw.state)


def test_version_is_that_of_the_project():
    text = (Path(pw.__file__).parents[2] / "pyproject.toml").read_text("utf8")
    assert re.search(r'^version = "(.*)"', text, re.M).group(1) == pw.__version__


@pytest.mark.parametrize(
    "module", ["pennyweight", "pennyweight.runtime", "pennyweight.program", "pennyweight.cli.main"]
)
def test_importing_does_not_import_torch(module):
    code = f"import sys, {module}; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

"""Exit codes, errors in one line, --debug, and that every verb explains itself."""

import subprocess
import sys

import pytest

from pennyweight.cli.main import CODES, app, main
from pennyweight.errors import RecipeError


@pytest.mark.parametrize("verb", ["demo", "quantize", "run", "bench", "inspect", "doctor", "list"])
def test_help(run, verb):
    code, out, _ = run(verb, "--help")
    assert code == 0
    assert "Usage" in out
    assert "--json" in out


def test_help_names_the_verbs(run):
    code, out, _ = run("--help")
    assert code == 0
    assert all(command.name in out for command in app.registered_commands)
    assert "Exit codes" in out


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["quantize"], CODES["usage"]),
        (["quantise"], CODES["usage"]),
        (["list", "--nonsense"], CODES["usage"]),
        (["bench", "m.dwt", "--batch", "a"], CODES["usage"]),
        (["bench", "m.dwt", "--threads", "-1"], CODES["usage"]),
        (["quantize", "usernets:net", "-o", "a.dwt", "--mean", "x"], CODES["usage"]),
        (["list", "grid"], CODES["refused"]),
        (["quantize", "usernets:net", "-o", "a.dwt"], CODES["refused"]),
        (["inspect", "nothing.dwt"], CODES["system"]),
        (["quantize", "usernets:net", "-o", "no/folder/a.dwt"], CODES["system"]),
        (["list", "ranges"], CODES["done"]),
    ],
)
def test_exit_codes(run, arguments, code):
    got, out, err = run(*arguments)
    assert got == code
    assert "Traceback" not in err + out
    if code in (CODES["refused"], CODES["system"]):
        assert len([line for line in err.splitlines() if line.startswith("error: ")]) == 1


def test_debug_shows_the_traceback(folder):
    for arguments in (["--debug", "list", "grid"], ["list", "grid", "--debug"]):
        with pytest.raises(Exception, match="no kind of entry"):
            main(arguments)


def test_debug_by_environment(folder, monkeypatch):
    monkeypatch.setenv("PENNYWEIGHT_DEBUG", "1")
    with pytest.raises(RecipeError):
        main(["quantize", "usernets:net", "--recipe", "int9", "-o", "a.dwt"])


def test_defects_are_called_defects(run, monkeypatch):
    import pennyweight.cli.options as options

    monkeypatch.setattr(options, "numbers", None)
    from pennyweight.cli import quantize

    monkeypatch.setattr(quantize, "numbers", None)
    code, _, err = run("quantize", "usernets:net", "-o", "a.dwt")
    assert code == CODES["defect"]
    assert "unexpected TypeError" in err
    assert "--debug" in err


def test_interruption(run, monkeypatch):
    from pennyweight.cli import quantize

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(quantize, "find_recipe", stop)
    code, _, err = run("quantize", "usernets:net", "-o", "a.dwt")
    assert code in (CODES["interrupted"], 1)
    assert "Traceback" not in err


def test_the_installed_command():
    command = [sys.executable, "-m", "pennyweight.cli.main", "list", "ranges"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "minmax" in done.stdout

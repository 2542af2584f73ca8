"""`pennyweight migrate`: code on torch's or torchao's quantization, moved to the same names here."""

from __future__ import annotations

import ast
import difflib
import os
import re
import stat
import tokenize
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pennyweight.atomic import atomic_write
from pennyweight.cli.options import Json
from pennyweight.cli.output import emit, note
from pennyweight.errors import PennyweightError

if TYPE_CHECKING:
    from pennyweight.compat.migrate import Note

_FOREIGN = {"__pycache__", "node_modules", "site-packages", "dist-packages"}  # folders of other people's code


@dataclass
class _Tally:
    """What happened to the files."""

    read: int = 0
    changed: list[str] = field(default_factory=list)
    notes: list[dict[str, Any]] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)


def command(
    path: Annotated[list[Path], typer.Argument(help="Python files, or folders of them.")],
    write: Annotated[
        bool, typer.Option("--write", help="Change the files; otherwise only show the changes.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Rewrite imports and moved names, print the changes, and name each line that could not be carried over.

    In folders, what is hidden or installed (virtual environments, site-packages) is left alone. The printed changes are
    a patch. Line numbers are those of the file as it stands after the command.
    """
    try:
        import libcst as cst  # noqa: F401
    except ImportError as error:
        raise ImportError("migrate needs libcst: pip install 'pennyweight[migrate]'") from error
    for one in path:
        if not one.exists():
            raise FileNotFoundError(f"there is no file or folder {str(one)!r}")
        if one.is_file() and one.suffix == ".ipynb":
            raise PennyweightError(
                "a notebook is no Python file", site=str(one), hint="Save it as a script first."
            )
    tally = _Tally()
    for file in dict.fromkeys(f for one in path for f in _files(one)):
        tally.read += 1
        _migrate(file, tally, write=write, show=not as_json)
    if as_json:
        emit(
            {"files": tally.read, "changed": tally.changed, "notes": tally.notes, "broken": tally.broken},
            {},
            True,
        )
    else:
        verb = "changed" if write else "to change (--write does it)"
        typer.echo(
            f"{tally.read} files read, {len(tally.changed)} {verb}, {len(tally.notes)} lines not carried over"
        )
    if tally.broken:
        raise PennyweightError(
            f"{len(tally.broken)} of {tally.read} files could not be read", site=tally.broken[0]
        )


def _migrate(file: Path, tally: _Tally, *, write: bool, show: bool) -> None:
    """Read one file, rewrite it, show or write what changed. What cannot be read is named; the others go on."""
    import libcst as cst

    from pennyweight.compat.migrate import rewrite

    try:
        raw = file.read_bytes()
        encoding = _encoding(raw)
        old = raw.decode(encoding)
        result = rewrite(old)
    except cst.ParserSyntaxError as error:
        line, reason = _syntax(old) or (error.raw_line, " ".join(error.message.split()))
        return _broken(f"{file}:{line}: {reason}", tally)
    except RecursionError:
        return _broken(f"{file}: nested too deeply to be read", tally)
    except (SyntaxError, UnicodeDecodeError, OSError) as error:
        return _broken(f"{file}: {error}", tally)
    changed = result.code != old
    if changed:
        if show:
            typer.echo(patch(old, result.code, str(file)), nl=False)
        if write:
            _write(file, result.code.encode(encoding))
        tally.changed.append(str(file))
    for one in result.notes:
        line = one.now if write else one.line
        tally.notes.append({"file": str(file), **_fields(one, line)})
        if show:
            typer.echo(f"{file}:{line}: not carried over: {one.what}: {one.why}. {one.instead}")
    return None


def _syntax(code: str) -> tuple[int, str] | None:
    """Where Python itself sees the error, and what it says: nearer than libcst. None if it takes the text."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes and the like, which are no errors
            ast.parse(code)
    except SyntaxError as error:
        return (error.lineno, error.msg) if error.lineno else None
    except ValueError:  # bytes of zero
        return None
    return None


def _broken(line: str, tally: _Tally) -> None:
    note(f"{line} (left as it is)")
    tally.broken.append(line)


def _fields(one: Note, line: int) -> dict[str, Any]:
    return {"line": line, "what": one.what, "why": one.why, "instead": one.instead}


def _files(path: Path) -> Iterator[Path]:
    """The Python files of a folder, in order, without what is hidden, installed or built; a file is itself."""
    if not path.is_dir():
        yield path
        return
    for folder, inner, names in os.walk(path):
        here = Path(folder)
        inner[:] = sorted(n for n in inner if not _foreign(here / n))
        yield from (here / n for n in sorted(names) if n.endswith(".py") and (here / n).is_file())


def _foreign(folder: Path) -> bool:
    hidden = folder.name.startswith(".") or folder.name in _FOREIGN
    return hidden or (folder / "pyvenv.cfg").is_file()


def _encoding(raw: bytes) -> str:
    """The encoding that a file's first two lines or its mark declare. `utf-8-sig` keeps the mark."""
    lines = iter(raw.splitlines(keepends=True))
    return tokenize.detect_encoding(lambda: next(lines, b""))[0]


def _write(file: Path, data: bytes) -> None:
    """Replace a file's contents: a link stays a link, and a script stays executable."""
    real = file.resolve()
    mode = stat.S_IMODE(real.stat().st_mode)
    with atomic_write(real) as target:
        target.write(data)
        Path(target.name).chmod(mode)


def patch(old: str, new: str, name: str) -> str:
    """What changed, as a unified diff that `patch` and `git apply` take.

    Args:
        old: the text before.
        new: the text after.
        name: of the file.
    """
    before, after = (re.findall(r"[^\n]*\n|[^\n]+", text) for text in (old, new))
    made = []
    for line in difflib.unified_diff(before, after, name, name):
        made.append(line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n")
    return "".join(made)

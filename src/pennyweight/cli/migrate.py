"""`pennyweight migrate`: code on torch's or torchao's quantization, moved to the same names here."""

from __future__ import annotations

import difflib
import tokenize
from pathlib import Path
from typing import Annotated

import typer

from pennyweight.atomic import atomic_write
from pennyweight.errors import PennyweightError


def command(
    path: Annotated[Path, typer.Argument(help="A Python file, or a folder of them.")],
    write: Annotated[
        bool, typer.Option("--write", help="Change the files; otherwise only show the changes.")
    ] = False,
) -> None:
    """Rewrite imports and moved names, print the changes, and name each line that could not be carried over."""
    try:
        import libcst as cst

        from pennyweight.compat.migrate import rewrite
    except ImportError as error:
        raise ImportError("migrate needs libcst: pip install 'pennyweight[migrate]'") from error
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    files = sorted(p for p in path.rglob("*.py") if p.is_file()) if path.is_dir() else [path]
    changed, noted, broken = 0, 0, []
    for file in files:
        try:
            with tokenize.open(file) as source:
                encoding = source.encoding
            old = file.read_bytes().decode(encoding)
            result = rewrite(old)
        except cst.ParserSyntaxError as error:
            broken.append(f"{file}:{error.raw_line}: {error.message}")
            continue
        except (SyntaxError, UnicodeDecodeError) as error:
            broken.append(f"{file}: {error}")
            continue
        if result.code != old:
            changed += 1
            diff = difflib.unified_diff(
                old.splitlines(keepends=True), result.code.splitlines(keepends=True), str(file), str(file)
            )
            typer.echo("".join(diff), nl=False)
            if write:
                with atomic_write(file) as target:
                    target.write(result.code.encode(encoding))
        for note in result.notes:
            noted += 1
            typer.echo(f"{file}:{note.line}: not carried over: {note.what}. {note.instead}")
    for line in broken:
        typer.echo(f"{line} (left as it is)", err=True)
    verb = "changed" if write else "to change (--write does it)"
    typer.echo(f"{len(files)} files read, {changed} {verb}, {noted} lines not carried over")
    if broken:
        raise PennyweightError(f"{len(broken)} of {len(files)} files are no Python", site=broken[0])

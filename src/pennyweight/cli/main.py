"""The command line. Exit codes:

0    done
1    done, but a measured promise was not kept (accuracy dropped too far)
2    the command line itself is wrong
3    refused: the error line says what, where and what to do
4    the system refused: a file, a folder or a missing package
5    a defect of this program; `--debug` shows where
130  interrupted
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import typer

from pennyweight.cli import (
    bench,
    demo,
    diagnose,
    doctor,
    inspecting,
    listing,
    llm,
    migrate,
    quantize,
    report,
    run,
    tune,
)
from pennyweight.errors import PennyweightError

CODES = {"done": 0, "not_kept": 1, "usage": 2, "refused": 3, "system": 4, "defect": 5, "interrupted": 130}

app = typer.Typer(
    name="pennyweight",
    help="Makes trained PyTorch networks small and fast without making them wrong, and proves it.",
    epilog="Exit codes: 0 done, 1 a measured promise not kept, 2 wrong command line, 3 refused, 4 system, 5 defect. "
    "--debug, anywhere, shows the traceback of an error.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("demo")(demo.command)
app.command("quantize")(quantize.command)
app.command("tune")(tune.command)
app.command("diagnose")(diagnose.command)
app.command("report")(report.command)
app.command("run")(run.command)
app.command("bench")(bench.command)
app.command("inspect")(inspecting.command)
app.command("doctor")(doctor.command)
app.command("list")(listing.command)
app.command("migrate")(migrate.command)
app.add_typer(llm.app, name="llm")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code. `--debug` may stand anywhere."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments or bool(os.environ.get("PENNYWEIGHT_DEBUG"))
    arguments = [a for a in arguments if a != "--debug"]
    try:
        app(args=arguments, prog_name="pennyweight")
    except SystemExit as done:
        return done.code if isinstance(done.code, int) else CODES["done"]
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return CODES["interrupted"]
    except Exception as error:
        if debug:
            raise
        return _explain(error)
    return CODES["done"]


def _explain(error: Exception) -> int:
    """One line on standard error; returns the exit code."""
    line = " ".join(str(error).split())
    if isinstance(error, PennyweightError):
        print(f"error: {line}", file=sys.stderr)
        return CODES["refused"]
    if isinstance(error, OSError | ImportError | MemoryError):
        print(f"error: {line or type(error).__name__}", file=sys.stderr)
        return CODES["system"]
    print(
        f"error: unexpected {type(error).__name__}: {line}. Run with --debug to see where.", file=sys.stderr
    )
    return CODES["defect"]


def process() -> NoReturn:
    """The command as a process: it ends with the exit code.

    Where processes trained together it ends at once: torch's communication threads outlive their group, and one that
    asks a finishing Python 3.11 for its lock aborts the process, whose work is done and written.
    """
    code = main()
    shards = sys.modules.get("pennyweight.llm.shards")
    if shards is not None and shards.began:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    process()

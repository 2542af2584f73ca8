"""`pennyweight run`: a .dwt file on arrays, without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pennyweight.cli.options import Backend, Json, Threads
from pennyweight.cli.output import emit


def command(
    file: Annotated[Path, typer.Argument(help="A .dwt file.")],
    input: Annotated[  # noqa: A002 (the option's name)
        list[str],
        typer.Option(
            "--input", "-i", help="x.npy, name=x.npy, or a .npz with one array per input. Repeatable."
        ),
    ],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write results here: .npy for one, .npz for more.")
    ] = None,
    backend: Backend = "auto",
    threads: Threads = 0,
    json: Json = False,
) -> None:
    """Run FILE on arrays, without PyTorch."""
    from pennyweight.runtime import load

    session = load(file, backend=backend, threads=threads)
    result = session.run(*arguments(input))
    arrays = dict(flat("", result))
    if out is not None:
        write(out, arrays)
    rows = [
        {"result": name or "-", "dtype": str(a.dtype), "shape": list(a.shape),
         "least": float(a.min()) if a.size else None, "greatest": float(a.max()) if a.size else None}
        for name, a in arrays.items()
    ]  # fmt: skip
    values: dict[str, Any] = {
        "file": str(file),
        "backend": session.backend,
        "note": session.note,
        "results": rows,
    }
    values["out"] = None if out is None else str(out)
    emit(values, {f"backend {session.backend}": rows}, json)


def arguments(inputs: list[str]) -> list[Any]:
    """Arrays in order, or one dict by name.

    Raises:
        InputError: if named and unnamed files are mixed, or a file is none of numpy's.
    """
    import numpy as np

    from pennyweight.errors import InputError
    from pennyweight.runtime.arrays import load_arrays

    named: dict[str, Any] = {}
    plain: list[Any] = []
    for text in inputs:
        name, equals, path = text.partition("=")
        found = load_arrays(Path(path if equals else text))
        if equals:
            if len(found) != 1:
                raise InputError(f"{path} holds {len(found)} arrays for one input", site=text)
            named[name] = np.asarray(next(iter(found.values())))
        elif "" in found:
            plain.append(np.asarray(found[""]))
        else:
            named.update(found)
    if named and plain:
        raise InputError("some inputs have names and others have none", hint="Write name=x.npy for each.")
    return [named] if named else plain


def flat(name: str, value: Any) -> list[tuple[str, Any]]:
    """The leaves of a nested result with dotted names."""
    if isinstance(value, dict):
        return [leaf for k, v in value.items() for leaf in flat(f"{name}.{k}".lstrip("."), v)]
    if isinstance(value, list):
        return [leaf for i, v in enumerate(value) for leaf in flat(f"{name}.{i}".lstrip("."), v)]
    return [] if value is None else [(name, value)]


def write(out: Path, arrays: dict[str, Any]) -> None:
    """Write results atomically.

    Raises:
        InputError: if there are several results for a `.npy` file, or the suffix is another.
    """
    import numpy as np

    from pennyweight.atomic import atomic_write
    from pennyweight.errors import InputError

    if out.suffix == ".npy" and len(arrays) == 1:
        with atomic_write(out) as file:
            np.save(file, next(iter(arrays.values())), allow_pickle=False)
    elif out.suffix == ".npz":
        with atomic_write(out) as file:
            np.savez(file, **{name or "result": a for name, a in arrays.items()})
    else:
        what = (
            f"{len(arrays)} results do not fit a .npy file"
            if out.suffix == ".npy"
            else "this suffix is unknown"
        )
        raise InputError(what, site=str(out), hint="Write .npz.")

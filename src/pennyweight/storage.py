"""`save` and `load`: whole-graph files through lowering, module files as plain tensors beside the recipe."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

import pennyweight
from pennyweight.errors import FormatError, LowerError, PennyweightError, nearest
from pennyweight.exporters import exporters
from pennyweight.graph.record import call
from pennyweight.journal import Journal
from pennyweight.measure import differences
from pennyweight.modules import load_module, save_module
from pennyweight.pipeline import State, state
from pennyweight.program.ir import Array, Program, TensorType
from pennyweight.program.lower import lower
from pennyweight.runtime.session import Session
from pennyweight.runtime.session import load as load_session

SAMPLES = 16  # of the example, at most, to measure the difference on


def save(
    model: nn.Module | Program, path: str | os.PathLike[str], example: Any = None, *, compress: bool = False
) -> Path:
    """Write a model to a file; the suffix says which kind.

    `.dwt` holds the whole graph, to be run without torch: the model is lowered, the difference between it and the
    program is measured on the example and recorded, and recipe, journal and versions go with it. `.safetensors` holds
    the converted module's tensors, recipe and journal, for models that have no whole-graph form. Other suffixes are
    those of the registered exporters.

    Args:
        model: from `quantize` or `convert`; a float module; or a program.
        path: target; written beside it first, then renamed, so that no half-written file is ever seen.
        example: one batch to lower with; the one that the model was prepared with otherwise.
        compress: deflate a `.dwt` file: about a tenth smaller, but inflated into memory at every loading (some 5 ms a
            megabyte) instead of mapped.

    Returns:
        The path.

    Raises:
        LowerError: if the model has no whole-graph form; the error names the line, and the module still runs.
        FormatError: if the suffix is unknown, or the format cannot be compressed.
        OSError: if the file cannot be written.
    """
    target = Path(path)
    kind = target.suffix.removeprefix(".")
    if kind == "safetensors":
        if compress:
            raise FormatError("module files are not compressed", site=str(target), hint="Save it as .dwt.")
        if isinstance(model, Program):
            raise FormatError("a program has no modules to store", site=str(target), hint="Save it as .dwt.")
        save_module(model, target, provenance(model))
        return target
    if kind not in exporters:
        known = [f".{name}" for name in [*exporters, "safetensors"]]
        raise FormatError(
            f"suffix {target.suffix!r} names no file format",
            site=str(target),
            hint=nearest(target.suffix, known, "suffixes"),
        )
    model = getattr(model, "uncompiled", model)
    program = model if isinstance(model, Program) else lowered(model, example)
    exporters[kind](program, target, compress=compress)
    return target


def load(
    path: str | os.PathLike[str],
    model: nn.Module | None = None,
    example: Any = None,
    *,
    backend: str = "auto",
    threads: int = 0,
) -> Any:
    """Read what `save` wrote.

    Args:
        path: a `.dwt` file, which gives a `Session`, or a `.safetensors` file, which gives a module.
        model: for a module file, the float model that it was made from; left untouched.
        example: for a module file, one batch; no calibration data are needed.
        backend: for a `.dwt` file, see `runtime.Session`.
        threads: likewise.

    Raises:
        FormatError: if the file breaks a promise, or does not belong to `model`.
        OSError: if it cannot be opened.
    """
    suffix = Path(path).suffix
    if suffix == ".dwt":
        return load_session(path, backend=backend, threads=threads)
    if suffix == ".safetensors":
        if model is None or example is None:
            raise FormatError(
                "a module file needs the float model and one batch",
                site=os.fspath(path),
                hint="pw.load(path, model=..., example=...). A .dwt file needs neither.",
            )
        return load_module(model, path, example)
    raise FormatError(
        f"suffix {suffix!r} names no file that can be loaded",
        site=os.fspath(path),
        hint=nearest(suffix, [".dwt", ".safetensors"], "suffixes"),
    )


def lowered(model: nn.Module, example: Any = None) -> Program:
    """Lower a model, measure the difference on the example, and keep both with what made it in `program.meta`.

    Raises:
        LowerError: if there is no example, or the model has no whole-graph form.
    """
    log = _journal(model)
    if example is None:
        example = _state(model).example if _state(model) is not None else None  # type: ignore[union-attr]
    if example is None:
        raise LowerError(
            "there is no example batch to lower with", site=type(model).__name__, hint="Pass example=..."
        )
    program = lower(model, example)
    measured = difference(model, program, example)
    log.events[:] = [
        event for event in log.events if event.kind != "lowered"
    ]  # the newest measurement counts
    log.add("lowered", "", ops=len(program.ops), **measured)
    program.meta.update(provenance(model))
    program.meta["difference"] = measured
    return program


def difference(model: nn.Module, program: Program, example: Any) -> dict[str, Any]:
    """How far the program is from the eager model, on at most 16 samples of the example.

    Returns:
        max_abs: greatest absolute difference; sqnr_db: `10 log10(sum y^2 / sum (y - p)^2)`, 200 where equal;
        argmax_differs: fraction of rows of the last axis whose greatest entry is another; samples, backend.

    Raises:
        LowerError: if the program was not made from this model: it has another number of results.
    """
    batch, arrays = fitted(program, example)
    with torch.no_grad():
        result = call(model.eval(), batch)
    eager = [t.detach().numpy() for t in tree_flatten(result)[0] if isinstance(t, Tensor)]
    session = Session(program)
    values = session.engine.run(session.checked((arrays,)))
    mine = [values[n] for n in program.outputs]
    if len(eager) != len(mine):
        raise LowerError(
            f"the program has {len(mine)} results, the model {len(eager)}", site=type(model).__name__
        )
    return {
        **differences(eager, mine),
        "samples": next((a.shape[0] for a in arrays.values() if a.ndim), 1),
        "backend": session.backend,
    }


def fitted(program: Program, example: Any) -> tuple[Any, dict[str, Array]]:
    """The example cut or repeated along the batch to what the program takes, as a batch and as arrays by input name."""
    keyword = isinstance(example, Mapping)
    batch = dict(example) if keyword else tuple(example) if isinstance(example, tuple | list) else (example,)
    leaves, tree = tree_flatten(batch)
    types = iter(program.inputs.items())
    arrays: dict[str, Array] = {}
    sizes: dict[str, int] = {}
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor):
            name, kind = next(types)
            leaves[i] = _resized(leaf, kind, sizes)
            arrays[name] = leaves[i].detach().contiguous().numpy()
    return tree_unflatten(leaves, tree), arrays


def _resized(x: Tensor, kind: TensorType, sizes: dict[str, int]) -> Tensor:
    """An input of the sizes that the program wants; `sizes` holds those of the symbols met so far."""
    for axis, rows in enumerate(kind.shape):
        if isinstance(rows, str):
            wanted = sizes.setdefault(
                rows, min(x.shape[axis], SAMPLES if rows.startswith("batch") else 2**31)
            )
        else:
            wanted = rows
        while x.shape[axis] < wanted:
            x = torch.cat([x, x], axis)
        x = x.narrow(axis, 0, wanted)
    return x.float() if kind.dtype == "f32" else x


def provenance(model: nn.Module) -> dict[str, Any]:
    """What made a model, as plain JSON values: class, recipe text, journal, versions."""
    st = _state(model)
    return {
        "model": f"{type(model).__module__}.{type(model).__qualname__}",
        "recipe": "" if st is None else st.recipe.to_text(),
        "journal": [[e.kind, e.site, e.data] for e in _journal(model)],
        "versions": {
            "pennyweight": pennyweight.__version__,
            "torch": str(torch.__version__),
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
    }


def _state(model: nn.Module) -> State | None:
    try:
        return state(model)
    except PennyweightError:
        return None  # a float module: it can be lowered and saved all the same


def _journal(model: nn.Module) -> Journal:
    st = _state(model)
    return Journal() if st is None else st.journal

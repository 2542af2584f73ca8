"""`profile`: the execution report of a model, compared with the same model in float, layer by layer."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pennyweight.errors import InputError, LowerError, PennyweightError
from pennyweight.graph.record import call
from pennyweight.passes import clone
from pennyweight.pipeline import state
from pennyweight.plan import LEAVES
from pennyweight.program.ir import Program
from pennyweight.program.lower import lower
from pennyweight.runtime.peaks import Peaks, stored
from pennyweight.runtime.profile import Profile, profile_session
from pennyweight.runtime.session import Session
from pennyweight.runtime.session import load as load_session

Runnable = nn.Module | Program | Session | str | os.PathLike[str]
TURNS = 9  # runs of the float module under hooks


def profile(
    model: Runnable,
    example: Any = None,
    *,
    against: nn.Module | Program | Session | None = None,
    backend: str = "auto",
    threads: int = 0,
    seconds: float = 1.0,
    peaks: Peaks | None = None,
) -> Profile:
    """Where the time of a run goes: kernel, time, rate and fraction of the machine's peak of every layer.

    Args:
        model: a converted or float module (lowered first), a program, a session, or the path of a .dwt file.
        example: one batch to run on; that of the preparation otherwise. A tensor, an array, a tuple of positional
            arguments, or a dict of keyword arguments.
        against: the same model in float, to say of each layer whether quantizing it pays. A module is lowered, with
            its batch norms folded, and runs on the same engine, in turns: the time that the layer would take if it
            were kept in float. A module without a whole-graph form runs in PyTorch, its layers timed by hooks.
        backend: see `Session`; of a session, its own.
        threads: likewise.
        seconds: to spend on each side, at least.
        peaks: of this machine; those that `pennyweight doctor --calibrate` has stored otherwise.

    Raises:
        InputError: if there is no example, or it does not fit.
        LowerError: if the model has no whole-graph form.

    >>> pw.profile(quantized, images, against=model).slower_than_float     # doctest: +SKIP
    """
    if example is None and isinstance(model, nn.Module):
        try:
            example = state(model).example
        except PennyweightError:
            example = None
    if example is None:
        raise InputError("there is no example to run on", hint="pw.profile(model, example).")
    session = session_of(model, example, backend, threads)
    inputs = arrays_of(session, example)
    peaks = stored() if peaks is None else peaks
    if against is None:
        return profile_session(session, inputs, peaks=peaks, seconds=seconds)
    try:
        other = float_session(against, example, session)
    except LowerError:
        if not isinstance(against, nn.Module):
            raise
        times = hooked_times(against, example, session.engine.threads)
        source = f"PyTorch {torch.__version__}, layers timed by hooks"
        return profile_session(
            session, inputs, float_times=times, float_source=source, peaks=peaks, seconds=seconds
        )
    return profile_session(session, inputs, against=other, peaks=peaks, seconds=seconds)


def session_of(model: Runnable, example: Any, backend: str = "auto", threads: int = 0) -> Session:
    """A session of whatever can be run."""
    if isinstance(model, Session):
        return model
    if isinstance(found := getattr(model, "session", None), Session):  # a compiled module
        return found
    if isinstance(model, str | os.PathLike):
        return load_session(Path(model), backend=backend, threads=threads)
    program = model if isinstance(model, Program) else lower(model.eval(), tensors_of(example))
    return Session(program, backend=backend, threads=threads)


def float_session(model: nn.Module | Program | Session, example: Any, like: Session) -> Session:
    """The float model on the engine of another session, as fast as it is there: lowering folds its batch norms.

    Raises:
        LowerError: if it has no whole-graph form.
    """
    model = clone(model) if isinstance(model, nn.Module) else model  # lowering puts it into eval mode
    return session_of(model, example, like.backend, like.engine.threads)


def tensors_of(example: Any) -> Any:
    """A batch with its arrays as tensors."""
    return torch.utils._pytree.tree_map(
        lambda x: x if isinstance(x, Tensor) or not hasattr(x, "__array__") else torch.from_numpy(x), example
    )


def arrays_of(session: Session, example: Any) -> dict[str, Any]:
    """A batch as arrays by the names that a session has for them.

    Raises:
        InputError: if it has another number of tensors.
    """
    names = [port.name for port in session.inputs]
    if isinstance(example, Mapping) and set(example) == set(names):
        leaves = [example[n] for n in names]
    else:
        leaves = [x for x in tree_leaves(example) if hasattr(x, "__array__")]
    if len(leaves) != len(names):
        raise InputError(
            f"the example has {len(leaves)} tensors, the model takes {len(names)}",
            hint=f"Inputs: {', '.join(map(str, session.inputs))}.",
        )
    return {n: x.detach().numpy() if isinstance(x, Tensor) else x for n, x in zip(names, leaves, strict=True)}


def hooked_times(model: nn.Module, example: Any, threads: int) -> dict[str, float]:
    """Median nanoseconds of each layer of a float module in PyTorch, by path; what functions do is not seen."""
    started: dict[str, int] = {}
    runs: list[dict[str, int]] = []
    batch = tensors_of(example)

    def before(path: str) -> Any:
        def hook(*_: Any) -> None:
            started[path] = time.perf_counter_ns()

        return hook

    def after(path: str) -> Any:
        def hook(*_: Any) -> None:
            taken = time.perf_counter_ns() - started[path]
            runs[-1][path] = runs[-1].get(path, 0) + taken

        return hook

    handles = []
    for path, module in model.named_modules():
        inside = any(
            type(m).__name__ in LEAVES for name, m in model.named_modules() if path.startswith(f"{name}.")
        )
        if type(module).__name__ in LEAVES or (not inside and not list(module.children())):
            handles += [
                module.register_forward_pre_hook(before(path)),
                module.register_forward_hook(after(path)),
            ]
    try:
        with _threads(threads), torch.inference_mode():
            for _ in range(TURNS + 2):
                runs.append({})
                call(model.eval(), batch)
    finally:
        for handle in handles:
            handle.remove()
    found = runs[2:]  # the first two allocate
    return {path: statistics.median(run.get(path, 0) for run in found) for path in found[0]}


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)

"""A loaded model that runs on numpy arrays: inputs checked, the engine called, the result put back into its shape."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np

from pennyweight.errors import InputError, KernelError, VerifyError, nearest
from pennyweight.program.bounds import check_sizes
from pennyweight.program.ir import Array, Dim, Program, TensorType, numpy_dtype
from pennyweight.program.verify import infer
from pennyweight.runtime import engine, library
from pennyweight.runtime.format import read_typed

BACKENDS = ("auto", "native", "reference")


class Port(NamedTuple):
    """One input or output. Sizes that the caller chooses are names ("batch"); "?" is a size computed from them."""

    name: str
    dtype: str
    shape: tuple[Dim, ...]

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype}[{', '.join(map(str, self.shape))}]"


class Reference:
    """The numpy interpreter behind the engine's interface: slow, and the definition of what is right."""

    name, isa, threads = "reference", "numpy", 1

    def __init__(self, program: Program) -> None:
        self.program = program

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name."""
        from pennyweight.program.interpret import interpret

        return interpret(self.program, inputs)

    def plan_for(self, shapes: tuple[tuple[int, ...], ...], types: Mapping[str, TensorType]) -> None:
        """There is nothing to plan."""

    def steps(self, inputs: Mapping[str, Array]) -> list[dict[str, Any]]:
        """What runs, in order: op, site, kernel. Multiply-adds and bytes are not counted here."""
        return [
            {"op": op.kind, "site": op.site, "kernel": "numpy", "macs": 0, "bytes": 0, "tasks": 1}
            for op in self.program
        ]

    def timed(self, inputs: Mapping[str, Array]) -> tuple[list[int], int, int]:
        """Run once: nanoseconds of each op, of what is around them, and of the call."""
        from pennyweight.program.interpret import interpret

        times: list[int] = []
        before = time.perf_counter_ns()
        interpret(self.program, inputs, watch=lambda op, ns: times.append(ns))
        wall = time.perf_counter_ns() - before
        return times, wall - sum(times), wall

    def profile(self, inputs: Mapping[str, Array]) -> list[dict[str, Any]]:
        """One row per op, in order: op, site, kernel, ns."""
        times, _, _ = self.timed(inputs)
        return [{**step, "ns": t} for step, t in zip(self.steps(inputs), times, strict=True)]


class Session:
    """A program ready to run. Safe to call from many threads at once.

    Args:
        program: from a file, or from `lower`.
        backend: "native" for the engine, "reference" for the numpy interpreter, "auto" for the engine where its
            library is there. `session.backend` says which one it became, `session.note` why.
        threads: of the engine; 0 for one per core.
        plans: sets of input sizes that the engine keeps planned; the least recently used goes first.
        begun: what `load` has begun for the engine already.

    Raises:
        KernelError: if the engine is asked for and cannot be had, or cannot run this program.

    >>> session = load("model.dwt")                            # doctest: +SKIP
    >>> session.run(np.zeros((1, 1, 28, 28), np.float32))      # doctest: +SKIP
    """

    def __init__(
        self,
        program: Program,
        *,
        backend: str = "auto",
        threads: int = 0,
        plans: int = 64,
        begun: engine.Begun | None = None,
    ) -> None:
        if backend not in BACKENDS:
            raise KernelError(f"there is no backend {backend!r}", hint=nearest(backend, BACKENDS, "backends"))
        self.program = program
        self.threads = threads
        self._ports = [(name, numpy_dtype(kind.dtype), kind) for name, kind in program.inputs.items()]
        self._fits: set[tuple[tuple[int, ...], ...]] = set()
        self._passed = False  # whether the program's sizes have been checked, for some inputs
        self._types: Mapping[str, TensorType] | None = (
            None  # at the example's sizes, where those have been checked
        )
        self.backend, self.note, self.engine = _engine(program, backend, threads, plans, begun)

    # -- what it takes and gives --------------------------------------------------------------------------------

    @property
    def inputs(self) -> list[Port]:
        """The inputs, in order."""
        return [Port(name, str(dtype), kind.shape) for name, dtype, kind in self._ports]

    @property
    def outputs(self) -> list[Port]:
        """The results' leaves, in order; `program.tree` says how `run` nests them."""
        first = self.program.symbols
        here = infer(self.program, first)
        there = []
        for symbol, size in first.items():
            with suppress(VerifyError):  # a model may want even sizes; this one's name is then not shown
                there.append((symbol, infer(self.program, {**first, symbol: size + 1})))
        ports = []
        for name in self.program.outputs:
            shape: list[Dim] = list(here[name].ints)
            for symbol, types in there:
                for axis, (a, b) in enumerate(zip(here[name].ints, types[name].ints, strict=True)):
                    if a != b:
                        shape[axis] = symbol if a == first[symbol] and b == a + 1 else "?"
            ports.append(Port(name, str(numpy_dtype(here[name].dtype)), tuple(shape)))
        return ports

    def __repr__(self) -> str:
        inputs = ", ".join(map(str, self.inputs))
        return f"Session({inputs} -> {', '.join(map(str, self.outputs))}; {self.backend})"

    # -- running ------------------------------------------------------------------------------------------------

    def run(self, *inputs: Any) -> Any:
        """Run once.

        Args:
            inputs: one array per input of the model, in order, or a single dict of arrays by name. The dtype must be
                the declared one; nothing is cast.

        Returns:
            What the model returned: an array, or lists and dicts of arrays.

        Raises:
            InputError: on a wrong name, dtype, rank or size.
        """
        values = self.engine.run(self.checked(inputs))
        return self._nested(self.program.tree, [values[n] for n in self.program.outputs])

    __call__ = run

    def profile(self, *inputs: Any) -> list[dict[str, Any]]:
        """Run once and return one row per step: kernel, op, site, ns, and macs and bytes where they are counted."""
        rows: list[dict[str, Any]] = self.engine.profile(self.checked(inputs))
        return rows

    def checked(self, inputs: tuple[Any, ...]) -> dict[str, Array]:
        """Inputs by name: of the declared dtypes, contiguous, of sizes that the program can take.

        Raises:
            InputError: if they are not.
        """
        given = self._named(inputs)
        arrays: dict[str, Array] = {}
        for name, dtype, kind in self._ports:
            array = np.asarray(given[name])
            if array.dtype != dtype:
                raise InputError(
                    f"input {name!r} is {array.dtype}, not {dtype}",
                    shapes=f"{array.shape}, wanted {kind}",
                    hint=f"Convert it: {name}.astype(np.{dtype}).",
                )
            flags = array.flags
            arrays[name] = array if flags.c_contiguous and flags.aligned else np.array(array, order="C")
        self.check_shapes(tuple(a.shape for a in arrays.values()))
        return arrays

    def check_shapes(self, shapes: tuple[tuple[int, ...], ...]) -> None:
        """Check the sizes of inputs in order, once for each set of sizes.

        Raises:
            InputError: if the program cannot take them.
        """
        if shapes in self._fits:
            return
        self._check_sizes(dict(zip(self.program.inputs, map(tuple, shapes), strict=True)))
        if len(self._fits) > 4096:
            self._fits.clear()
        self._fits.add(shapes)

    def _named(self, inputs: tuple[Any, ...]) -> Mapping[str, Any]:
        names = [name for name, _, _ in self._ports]
        if len(inputs) == 1 and isinstance(inputs[0], Mapping):
            given = inputs[0]
            for name in given:
                if name not in self.program.inputs:
                    raise InputError(f"there is no input {name!r}", hint=nearest(str(name), names, "inputs"))
            for name in names:
                if name not in given:
                    raise InputError(f"input {name!r} is missing", hint=f"Inputs: {', '.join(names)}.")
            return given
        if len(inputs) != len(names):
            raise InputError(
                f"{len(inputs)} arrays for {len(names)} inputs",
                hint=f"Inputs: {', '.join(str(p) for p in self.inputs)}.",
            )
        return dict(zip(names, inputs, strict=True))

    def _check_sizes(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Bind the symbols and infer every type at these sizes, so that no kernel meets a size it was not made for."""
        symbols = self.program.bind(shapes)
        try:
            if self._types is not None and symbols == self.program.symbols:
                types = self._types
            else:
                types = infer(self.program, symbols)
                check_sizes(self.program, types, again=self._passed)
        except VerifyError as error:
            made = ", ".join(f"{k} = {v}" for k, v in self.program.symbols.items()) or "fixed sizes"
            raise InputError(
                f"the model does not take inputs of these sizes: {error.what}",
                site=error.site,
                shapes=", ".join(f"{n} {s}" for n, s in shapes.items()),
                hint=f"It was made with {made}.",
            ) from error
        self._passed = True
        self.engine.plan_for(tuple(shapes.values()), types)  # the types are at hand now

    def _nested(self, tree: Any, values: list[Array]) -> Any:
        if isinstance(tree, dict):
            return {k: self._nested(v, values) for k, v in tree.items()}
        if isinstance(tree, list):
            return [self._nested(v, values) for v in tree]
        return None if tree is None else values[tree]


def _engine(
    program: Program, backend: str, threads: int, plans: int, begun: engine.Begun | None
) -> tuple[str, str, Any]:
    """The backend's name, why it was chosen, and the thing itself."""
    if backend == "reference":
        return "reference", "asked for", Reference(program)
    try:
        library.load()
    except (KernelError, OSError, AttributeError) as error:  # AttributeError: a library of another version
        why = error.what if isinstance(error, KernelError) else f"{type(error).__name__}: {error}"
        if backend == "native":
            raise
        return "reference", f"the native engine is not available: {why}", Reference(program)
    why = "asked for" if backend == "native" else "its library is there"
    return "native", why, engine.Engine(program, threads=threads, plans=plans, begun=begun)


def load(
    path: str | os.PathLike[str], *, backend: str = "auto", threads: int = 0, check_sum: bool = True
) -> Session:
    """Load a .dwt file.

    Args:
        path: the file.
        backend: see `Session`.
        threads: see `Session`.
        check_sum: verify the checksum of all bytes.

    Raises:
        FormatError: if the file breaks a promise of docs/format.md.
        OSError: if it cannot be opened.
        KernelError: see `Session`.
    """
    begun = None
    if backend in ("auto", "native") and threads != 1:
        with suppress(KernelError, OSError):  # whichever it is, what comes next says it
            begun = engine.Begun(os.stat(path).st_size)  # noqa: PTH116
    collecting = gc.isenabled()
    gc.disable()  # thousands of small objects, all of which stay: looking through them takes milliseconds
    try:
        program, types = read_typed(path, check_sum=check_sum)
    finally:
        if collecting:
            gc.enable()
    session = Session(program, backend=backend, threads=threads, begun=begun)
    session._passed, session._types = True, types
    return session

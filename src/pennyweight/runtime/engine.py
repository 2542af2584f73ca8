"""Programs on libpennyweight: one model per program, one plan per set of input sizes."""

from __future__ import annotations

import ctypes as c
import mmap
import os
import time
from _thread import allocate_lock
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import numpy as np

from pennyweight.errors import InputError, KernelError, nearest
from pennyweight.program.ir import Array, Program, TensorType, numpy_dtype
from pennyweight.program.verify import infer
from pennyweight.runtime import library as lib
from pennyweight.runtime.widen import widened
from pennyweight.runtime.words import Sentences, constant_words

_LARGE = 64 << 20  # bytes of a file whose pages are given back to the system when they have been packed
PLANS = 64  # sets of input sizes that an engine keeps ready; a plan is small: memory and weights belong to the model


_NOWHERE: tuple[Any, int] = (None, 0)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _place(array: Array) -> int:
    """Where it lies (`ctypes.data` says the same after ten times as much Python, all cold after a run)."""
    place: int = array.__array_interface__["data"][0]
    return place


def _mapping(array: Array) -> mmap.mmap | None:
    """The mapped file that an array looks at."""
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    base = base.obj if isinstance(base, memoryview) else base
    return base if isinstance(base, mmap.mmap) else None


class Plan:
    """A program planned for fixed input sizes; immutable, may be run from many threads at once."""

    def __init__(
        self, engine: Engine, symbols: Mapping[str, int], types: Mapping[str, TensorType] | None = None
    ) -> None:
        self._engine, self._library = engine, engine.library  # the engine's model must outlive the plan
        options = lib.Options(engine.threads, engine.isa_index, 0)
        self._handle = self._library.pw_plan_begin(engine.model, c.byref(options))
        if not self._handle:
            raise KernelError(lib.last_error(self._library))
        program = engine.program
        if types is None:
            types = infer(program, symbols)
        words, text, reals = Sentences(program, types, symbols, engine.constant_numbers).parts()
        made = self._library.pw_plan_make(
            self._handle, words.ctypes.data, words.size, text, len(text), reals.ctypes.data, reals.size
        )
        self._check(made)
        self._check(self._library.pw_plan_finish(self._handle))
        self.outputs = [(n, types[n].ints, numpy_dtype(types[n].dtype)) for n in program.outputs]
        self.results = [(n, types[n].ints, types[n].dtype) for n in program.outputs]
        self._given = c.c_void_p * len(program.inputs)
        self._taken = c.c_void_p * len(program.outputs)

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self._library.pw_plan_free(self._handle)

    def _check(self, code: int) -> int:
        if code < 0:
            raise KernelError(f"the engine refuses the program: {lib.last_error(self._library)}")
        return code

    def run(self, inputs: list[Array], ns: Any = None) -> list[Array]:
        """Run on dense arrays of the planned sizes.

        Raises:
            InputError: if an index among the inputs is out of range.

        With `ns`, c_int64 [steps + 1], each step is timed, and last what lies around them.
        """
        results = [np.empty(shape, dtype) for _, shape, dtype in self.outputs]
        self.call([_place(a) for a in inputs], [_place(a) for a in results], ns)
        return results

    def call(self, inputs: list[int], outputs: list[int], ns: Any = None) -> None:
        """As `run`, from and to memory at these addresses: dense, of the planned sizes, kept alive by the caller."""
        given, taken = self._given(*inputs), self._taken(*outputs)
        if ns is None:
            code = self._library.pw_plan_run(self._handle, given, taken)
        else:
            code = self._library.pw_plan_profile(self._handle, given, taken, ns)
        if code < 0:
            raise InputError(lib.last_error(self._library))

    @property
    def count(self) -> int:
        """How many steps there are."""
        return int(self._library.pw_plan_steps(self._handle))

    def steps(self) -> list[dict[str, Any]]:
        """What runs, in order: ops, site, kernel, multiply-adds, bytes, tasks."""
        info = lib.StepInfo()
        out = []
        for i in range(self.count):
            self._library.pw_plan_step(self._handle, i, c.byref(info))
            out.append(
                {
                    "op": info.op.decode(),
                    "site": info.site.decode(),
                    "kernel": info.kernel.decode(),
                    "macs": info.macs,
                    "bytes": info.bytes,
                    "tasks": info.tasks,
                }
            )
        return out

    @property
    def arena_bytes(self) -> int:
        """Bytes of activations and scratch memory of one run."""
        return int(self._library.pw_plan_arena_bytes(self._handle))


class Begun:
    """A model of about so many bytes that is about to be read: memory for it is fetched meanwhile, by a thread.

    Raises:
        KernelError: without the library.
    """

    def __init__(self, expected: int) -> None:
        self._library = lib.load()
        self._model = self._library.pw_model_create()
        self._library.pw_model_expect(self._model, expected)  # without it all is slower, not wrong

    def take(self) -> int:
        """The native model, now the caller's."""
        model: int = self._model
        self._model = 0
        return model

    def __del__(self) -> None:
        if getattr(self, "_model", 0):
            self._library.pw_model_free(self._model)


class Engine:
    """A program on libpennyweight. Safe to use from many threads.

    Args:
        program: a verified program.
        threads: of a run; 0 for one per core.
        isa: instruction set to use; "" for the default (`PENNYWEIGHT_ISA`, or the strongest).
        plans: how many sets of input sizes to keep planned; the least recently used goes first.
        begun: what was begun before the program was there.

    Raises:
        KernelError: without the library, on an unknown instruction set, or if the engine cannot run the program.
    """

    name = "native"

    def __init__(
        self,
        program: Program,
        *,
        threads: int = 0,
        isa: str = "",
        plans: int = PLANS,
        begun: Begun | None = None,
    ) -> None:
        program = widened(program)
        self.program, self.threads = program, threads or cores()
        self.library = lib.load()
        names = lib.supported_isas()
        if isa and isa not in names:
            raise KernelError(
                f"instruction set {isa!r} is unknown or not supported here", hint=nearest(isa, names)
            )
        self.isa = isa or lib.default_isa()
        self.isa_index = lib.isa_names().index(self.isa)
        self.model = self.library.pw_model_create() if begun is None else begun.take()
        self._arrays: list[Array] = []  # they are not copied
        places: list[int] = []
        for name, constant in program.constants.items():
            array, place = program.places.get(name, _NOWHERE)
            if array is not constant.data:
                array = np.ascontiguousarray(constant.data)
                place = _place(array)
            self._arrays.append(array)
            places.append(place)
        self.constant_numbers = {name: number for number, name in enumerate(program.constants)}
        words, count = constant_words(program), len(places)
        given = (c.c_void_p * count)(*places)
        if self.library.pw_model_constants(self.model, count, words.ctypes.data, words.size, given) < 0:
            raise KernelError(f"the engine refuses a constant: {lib.last_error(self.library)}")
        self._give_back()
        self.most_plans, self.plans_made = plans, 0
        # least recently used first; the last one found need not be moved
        self._plans: OrderedDict[tuple[tuple[int, ...], ...], Plan] = OrderedDict()
        self._last: Plan | None = None
        self._lock = allocate_lock()

    def _give_back(self) -> None:
        """Let the system have the pages of a mapped file again: what packing reads comes back, and goes when packed."""
        file = next((f for f in map(_mapping, self._arrays) if f is not None), None)
        if file is not None and hasattr(mmap, "MADV_DONTNEED") and len(file) > _LARGE:
            file.madvise(mmap.MADV_DONTNEED)
            start = np.frombuffer(file, np.uint8, 1)
            self.library.pw_model_mapped(self.model, _place(start), len(file))

    def __del__(self) -> None:
        self._plans, self._last = OrderedDict(), None
        if getattr(self, "model", None):
            self.library.pw_model_free(self.model)

    def plan(self, shapes: Mapping[str, tuple[int, ...]]) -> Plan:
        """The plan for inputs of these shapes; made once."""
        return self.plan_for(tuple(tuple(shapes[n]) for n in self.program.inputs))

    def plan_for(
        self, shapes: tuple[tuple[int, ...], ...], types: Mapping[str, TensorType] | None = None
    ) -> Plan:
        """As `plan`, the shapes in the order of the inputs. The least recently used plan makes room for a new one.

        `types`: of all values at these sizes, if the caller has inferred them already.
        """
        found = self._plans.get(shapes)
        if found is not None:
            if found is not self._last:
                self._last = found
                with suppress(KeyError):  # another thread may have thrown it out just now
                    self._plans.move_to_end(shapes)
            return found
        symbols = self.program.bind(dict(zip(self.program.inputs, shapes, strict=True)))
        with self._lock:
            found = self._plans.get(shapes)
            if found is None:
                found = self._last = self._plans[shapes] = Plan(self, symbols, types)
                self.plans_made += 1
                while len(self._plans) > self.most_plans:
                    self._plans.popitem(last=False)
        return found

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name. Inputs: contiguous arrays of the declared dtypes."""
        arrays = [inputs[n] for n in self.program.inputs]
        results = self.plan_for(tuple([a.shape for a in arrays])).run(arrays)
        return dict(zip(self.program.outputs, results, strict=True))

    def steps(self, inputs: Mapping[str, Array]) -> list[dict[str, Any]]:
        """What runs on inputs of these shapes, in order: op, site, kernel, macs, bytes, tasks."""
        return self._plan_of(inputs).steps()

    def timed(self, inputs: Mapping[str, Array]) -> tuple[list[int], int, int]:
        """Run once: nanoseconds of each step, of the engine around them, and of the call."""
        ns = (c.c_int64 * (self._plan_of(inputs).count + 1))()
        before = time.perf_counter_ns()
        arrays = [inputs[n] for n in self.program.inputs]
        results = self.plan_for(tuple([a.shape for a in arrays])).run(arrays, ns)
        dict(zip(self.program.outputs, results, strict=True))  # all that `run` does
        wall = time.perf_counter_ns() - before
        *steps, around = ns
        return steps, around, wall

    def profile(self, inputs: Mapping[str, Array]) -> list[dict[str, Any]]:
        """Run once; one row per step: op, site, kernel, ns, macs, bytes, tasks."""
        times, _, _ = self.timed(inputs)
        return [{**step, "ns": t} for step, t in zip(self.steps(inputs), times, strict=True)]

    def _plan_of(self, inputs: Mapping[str, Array]) -> Plan:
        return self.plan_for(tuple([inputs[n].shape for n in self.program.inputs]))

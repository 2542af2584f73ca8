"""Programs as a flat file of calls of the C surface, for native/tests/replay.cpp to make without Python.

All numbers are 64 bits, little endian; texts and bytes stand behind their length.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pennyweight.program.ir import Program
from pennyweight.runtime.engine import DTYPES, Engine


class Spy:
    """The library, with the calls that make a plan written down as they pass."""

    def __init__(self, library: Any) -> None:
        self.library = library
        self.calls: list[bytes] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.library, name)

    def pw_plan_value(self, plan, kind, index, dtype, rank, dims):
        self.calls.append(numbers(0, kind, index, dtype, rank, *dims[:rank]))
        return self.library.pw_plan_value(plan, kind, index, dtype, rank, dims)

    def pw_plan_op(self, plan, op, site, n_in, ins, n_out, outs, n_attr, attrs):
        written = [numbers(1), text(op), text(site), numbers(n_in, *ins[:n_in], n_out, *outs[:n_out], n_attr)]
        for attr in attrs[:n_attr]:
            written += [text(attr.name), numbers(attr.kind)]
            if attr.kind == 0:
                written.append(numbers(attr.count, *attr.ints[: attr.count]))
            elif attr.kind == 1:
                written.append(
                    numbers(attr.count) + struct.pack(f"<{attr.count}d", *attr.floats[: attr.count])
                )
            else:
                written.append(text(attr.text))
        self.calls.append(b"".join(written))
        return self.library.pw_plan_op(plan, op, site, n_in, ins, n_out, outs, n_attr, attrs)

    def pw_plan_output(self, plan, value, index):
        self.calls.append(numbers(2, value, index))
        return self.library.pw_plan_output(plan, value, index)


def numbers(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}q", *values)


def text(value: bytes) -> bytes:
    return numbers(len(value)) + value


def tensor(array: np.ndarray) -> bytes:
    return text(np.ascontiguousarray(array).tobytes())


def recorded(name: str, program: Program, inputs: Mapping[str, np.ndarray], exact: bool) -> bytes:
    """One program with its inputs and results; `exact`: the interpreter's are the engine's, bit for bit."""
    engine = Engine(program, threads=1)
    engine.library = spy = Spy(engine.library)
    given = [np.ascontiguousarray(inputs[n]) for n in program.inputs]
    plan = engine.plan({n: a.shape for n, a in zip(program.inputs, given, strict=True)})
    results = plan.run(given)
    out = [text(name.encode()), numbers(int(exact), len(program.constants))]
    for constant in program.constants.values():
        shape = constant.data.shape
        out += [numbers(DTYPES[constant.dtype], len(shape), *shape), tensor(constant.data)]
    out += [numbers(len(spy.calls)), *spy.calls, numbers(len(given)), *map(tensor, given)]
    out += [numbers(len(results)), *map(tensor, results)]
    return b"".join(out)


def write(path: Path, recordings: Iterable[bytes]) -> int:
    """Write a file for the replay; returns how many programs it holds."""
    parts = list(recordings)
    path.write_bytes(numbers(len(parts)) + b"".join(parts))
    return len(parts)

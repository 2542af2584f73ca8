"""Programs as a flat file of what the C surface is given, for native/tests/replay.cpp to make without Python.

All numbers are 64 bits, little endian; texts and bytes stand behind their length.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from pennyweight.program.ir import Program
from pennyweight.program.verify import infer
from pennyweight.runtime.engine import Engine
from pennyweight.runtime.words import DTYPES, Sentences


def numbers(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}q", *values)


def text(value: bytes) -> bytes:
    return numbers(len(value)) + value


def tensor(array: np.ndarray) -> bytes:
    return text(np.ascontiguousarray(array).tobytes())


def recorded(name: str, program: Program, inputs: Mapping[str, np.ndarray], exact: bool) -> bytes:
    """One program with its inputs and results; `exact`: the interpreter's are the engine's, bit for bit."""
    engine = Engine(program, threads=1)
    program = engine.program  # with what is stored small made wide
    given = [np.ascontiguousarray(inputs[n]) for n in program.inputs]
    plan = engine.plan({n: a.shape for n, a in zip(program.inputs, given, strict=True)})
    results = plan.run(given)
    symbols = program.bind({n: a.shape for n, a in zip(program.inputs, given, strict=True)})
    words, texts, reals = Sentences(
        program, infer(program, symbols), symbols, engine.constant_numbers
    ).parts()
    out = [text(name.encode()), numbers(int(exact), len(program.constants))]
    for constant in program.constants.values():
        shape = constant.data.shape
        out += [numbers(DTYPES[constant.dtype], len(shape), *shape), tensor(constant.data)]
    out += [tensor(words), text(texts), tensor(reals), numbers(len(given)), *map(tensor, given)]
    out += [numbers(len(results)), *map(tensor, results)]
    return b"".join(out)


def write(path: Path, recordings: Iterable[bytes]) -> int:
    """Write a file for the replay; returns how many programs it holds."""
    parts = list(recordings)
    path.write_bytes(numbers(len(parts)) + b"".join(parts))
    return len(parts)

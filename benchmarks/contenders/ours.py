"""Pennyweight: int8 programs on the engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import networks
import numpy as np

import pennyweight as pw
from pennyweight.runtime.engine import Engine

Run = Callable[[], np.ndarray]


def _engine(name: str, threads: int, work: Path, batch: int, recipe: str, isa: str = "") -> Run:
    path = work / f"{name}.{recipe}.dwt"
    example = networks.inputs(name, 1, batch)
    if not path.is_file():
        model = pw.quantize(networks.network(name), networks.calibration(name), recipe, progress=False)
        pw.save(model, path, example)
    program = pw.load(path, threads=threads).program
    engine = Engine(program, threads=threads, isa=isa)
    values = dict(zip(program.inputs, [x.numpy() for x in example], strict=True))
    return lambda: next(iter(engine.run(values).values()))


def int8(name: str, threads: int, work: Path, batch: int) -> Run:
    """Static int8, on the best instruction set."""
    return _engine(name, threads, work, batch, "int8")


def int8_vnni(name: str, threads: int, work: Path, batch: int) -> Run:
    """Static int8, held to AVX-512 VNNI."""
    return _engine(name, threads, work, batch, "int8", "avx512vnni")


def dynamic(name: str, threads: int, work: Path, batch: int) -> Run:
    """Dynamic int8, on the best instruction set."""
    return _engine(name, threads, work, batch, "int8-dynamic")

"""Pennyweight: programs on the engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import networks
import numpy as np

import pennyweight as pw

Run = Callable[[], np.ndarray]


def _session(name: str, threads: int, work: Path, batch: int, recipe: str) -> Run:
    path = work / f"{name}.{recipe}.dwt"
    example = networks.inputs(name, 1, batch)
    if not path.is_file():
        model = networks.network(name)
        if recipe != "float32":
            batches = networks.calibration(name, batch=batch)
            model = pw.quantize(model, batches, recipe, progress=False)
        pw.save(model, path, example)
    session = pw.load(path, threads=threads, backend="native")
    values = [x.numpy() for x in example]
    return lambda: np.asarray(session.run(*values))


def int8(name: str, threads: int, work: Path, batch: int) -> Run:
    """Static int8, on the best instruction set; recurrent layers range their inputs at run time."""
    return _session(name, threads, work, batch, "int8")


def int8_vnni(name: str, threads: int, work: Path, batch: int) -> Run:
    """The same; the harness holds the engine to AVX-512 VNNI by PENNYWEIGHT_ISA."""
    return _session(name, threads, work, batch, "int8")


def dynamic(name: str, threads: int, work: Path, batch: int) -> Run:
    """Dynamic int8, on the best instruction set."""
    return _session(name, threads, work, batch, "int8-dynamic")


def float32(name: str, threads: int, work: Path, batch: int) -> Run:
    """The float network as a program, on the best instruction set."""
    return _session(name, threads, work, batch, "float32")


def bf16(name: str, threads: int, work: Path, batch: int) -> Run:
    """bf16 layers, on the best instruction set."""
    return _session(name, threads, work, batch, "bf16")

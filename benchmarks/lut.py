"""A ternary matrix times a vector: our 2-bit kernels, which multiply and add, beside lookup tables, in turns.

usage: python benchmarks/lut.py [--shapes 2048x2048 5632x2048] [--seconds 2] [--compiler g++]

One thread. `multiply-add` is our linear layer on packed 2-bit codes with AVX2 (vpmaddubsw) and with the strongest
instruction set there is, its rescaling to floats included; `lookup` is `contenders/lut.cpp`, AVX2, compiled here, the
making of its tables included. Both are checked against integers before anything is timed. Ratios are medians over
rounds of (lookup / multiply-add): above 1 multiplying is faster.
"""

from __future__ import annotations

import argparse
import ctypes
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from pennyweight.measure import cpu_name, interleaved
from pennyweight.program.ir import Constant, Op, Program, TensorType
from pennyweight.runtime.engine import Engine

SOURCE = Path(__file__).parent / "contenders" / "lut.cpp"
Array = Any


def library(compiler: str, folder: str) -> ctypes.CDLL:
    """The lookup product, compiled."""
    target = Path(folder) / "lut.so"
    flags = ["-O3", "-mavx2", "-shared", "-fPIC", "-std=c++17"]
    subprocess.run([compiler, *flags, str(SOURCE), "-o", str(target)], check=True)
    return ctypes.CDLL(str(target))


def pair_codes(w: Array) -> Array:
    """Weights -1, 0, 1 [rows, k] in the order of `lut.cpp`."""
    rows, k = w.shape
    codes = (3 * (w[:, ::2] + 1) + w[:, 1::2] + 1).astype(np.uint8).reshape(rows // 32, 2, 16, k // 2)
    return np.ascontiguousarray((codes[:, 0] | codes[:, 1] << 4).swapaxes(1, 2))


def ternary(w: Array) -> Program:
    """A linear layer on packed 2-bit codes of these weights, accumulators to floats."""
    rows, k = w.shape
    places = (w + 1).astype(np.uint8).reshape(rows, k // 4, 4)
    constants = {
        "c": Constant("u8", (places << np.arange(0, 8, 2, dtype=np.uint8)).sum(-1).astype(np.uint8)),
        "t": Constant("i8", np.array([-1, 0, 1, 2], np.int8)),
        "m": Constant("f32", np.ones(rows, np.float32)),
    }
    ops = [
        Op("unpack", ("c", "t"), ("w",), {"bits": 2, "shape": [rows, k]}, "layer"),
        Op("linear", ("x", "w", ""), ("acc",), {"zero": 0}, "layer"),
        Op("rescale", ("acc", "m"), ("y",), {}, "layer"),
    ]
    return Program({"x": TensorType("u8", (1, k))}, ["y"], ops, constants)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", default=["2048x2048", "5632x2048"])
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--compiler", default="g++")
    args = parser.parse_args()
    print(f"{cpu_name()}, one thread")
    with tempfile.TemporaryDirectory() as folder:
        lut = library(args.compiler, folder)
        for shape in args.shapes:
            report(lut, *(int(s) for s in shape.split("x")), seconds=args.seconds)


def report(lut: ctypes.CDLL, n: int, k: int, seconds: float) -> None:
    """One shape."""
    rng = np.random.default_rng(0)
    w = rng.integers(-1, 2, (n, k), dtype=np.int8)
    x = rng.integers(0, 256, (1, k), dtype=np.uint8)
    want = (w.astype(np.int64) @ x[0].astype(np.int64)).astype(np.int64)
    codes, tables, sums = pair_codes(w), np.empty((k // 2, 32), np.int8), np.empty(n, np.int32)
    calls, kept = {}, []
    for name, isa in (("multiply-add, AVX2", "avx2"), ("multiply-add, strongest", "")):
        engine = Engine(ternary(w), threads=1, isa=isa)
        plan, y = engine.plan({"x": x.shape}), np.empty((1, n), np.float32)
        kept.append((engine, plan, y))
        calls[name] = lambda plan=plan, y=y: plan.call([x.ctypes.data], [y.ctypes.data])
        calls[name]()
        if not np.array_equal(y[0].astype(np.int64), want):
            raise SystemExit(f"{name} is wrong")
    places = [ctypes.c_void_p(a.ctypes.data) for a in (x, codes, tables, sums)]
    calls["lookup"] = lambda: lut.lut_product(*places, ctypes.c_int64(n), ctypes.c_int64(k))
    calls["lookup"]()
    if not np.array_equal(sums, want):
        raise SystemExit("the lookup is wrong")
    times = interleaved(calls, seconds=seconds, rounds=15)
    for name, found in times.items():
        ratio = found.speedup_over(times["lookup"])
        print(f"{n:>6}x{k:<5} {name:>24} {found.p50 / 1e3:>8.1f} us  lookup / this {ratio:.2f}", flush=True)


if __name__ == "__main__":
    main()

"""Linear layers of few rows on codes of 1, 2 and 4 bits beside our own int8, in turns, in one process.

usage: python benchmarks/lowbit.py [--shapes 5632x2048 32000x2048 512x512] [--rows 1] [--threads 2] [--seconds 2]
                                   [--isa avx512vnni]

Every contender is a program of one layer: codes in, a linear layer, its rescaling to floats out. The ratio is the
median over rounds of (int8's block median / the packed form's): above 1 the packed form is faster. `GB/s` counts the
bytes of weights as stored. Results are compared with those of the expanded weights before anything is timed.
"""

from __future__ import annotations

import argparse

import numpy as np

from pennyweight.measure import cpu_name, interleaved
from pennyweight.program.interpret import interpret
from pennyweight.program.ir import Constant, Op, Program, TensorType
from pennyweight.runtime.engine import Engine

TABLES = {
    "binary": (-1, 1),
    "ternary": (-1, 0, 1, 2),
    "seq2": (-3, -1, 1, 3),
    "pot4": (-64, -32, -16, -8, -4, -2, -1, 0, 1, 2, 4, 8, 16, 32, 64, 127),
    "int4": tuple(range(-8, 8)),
}


def programs(n: int, k: int, rows: int) -> dict[str, Program]:
    """The layer on int8 weights, and on each table's codes."""
    rng = np.random.default_rng(0)
    multiplier = Constant("f32", np.full(n, 1e-4, np.float32))
    tail = Op("rescale", ("acc", "m"), ("y",), {}, "layer")

    def program(constants: dict[str, Constant], ops: list[Op]) -> Program:
        inputs = {"x": TensorType("u8", (rows, k))}
        linear = Op("linear", ("x", "w", ""), ("acc",), {"zero": 37}, "layer")
        return Program(inputs, ["y"], [*ops, linear, tail], {**constants, "m": multiplier})

    out = {"int8": program({"w": Constant("i8", rng.integers(-127, 128, (n, k), dtype=np.int8))}, [])}
    for name, table in TABLES.items():
        bits = len(table).bit_length() - 1
        codes = rng.integers(0, 256, (n, k * bits // 8), dtype=np.uint8)
        constants = {"c": Constant("u8", codes), "t": Constant("i8", np.array(table, np.int8))}
        out[name] = program(constants, [Op("unpack", ("c", "t"), ("w",), {"bits": bits, "shape": [n, k]})])
    return out


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", default=["5632x2048", "32000x2048", "512x512"])
    parser.add_argument("--rows", type=int, nargs="+", default=[1])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--isa", default="")
    args = parser.parse_args()
    print(f"{cpu_name()}, {args.threads} threads, {args.isa or 'strongest instruction set'}")
    print(f"{'shape':>12} {'rows':>4} {'weights':>8} {'kernel':>20} {'us':>9} {'GB/s':>7} {'over int8':>9}")
    for shape in args.shapes:
        n, k = (int(s) for s in shape.split("x"))
        for rows in args.rows:
            report(n, k, rows, args)


def report(n: int, k: int, rows: int, args: argparse.Namespace) -> None:
    """One shape."""
    x = np.random.default_rng(1).integers(0, 256, (rows, k), dtype=np.uint8)
    engines, calls, made = {}, {}, programs(n, k, rows)
    for name, program in made.items():
        engine = engines[name] = Engine(program, threads=args.threads, isa=args.isa)
        plan, y = engine.plan({"x": x.shape}), np.empty((rows, n), np.float32)
        calls[name] = lambda plan=plan, y=y: plan.call([x.ctypes.data], [y.ctypes.data])
        calls[name]()
        if n * k < 20_000_000 and not np.array_equal(y, interpret(program, {"x": x})["y"]):
            raise SystemExit(f"{name} is wrong")
    times = interleaved(calls, seconds=args.seconds, rounds=15)
    for name, program in made.items():
        stored = sum(c.data.nbytes for c in program.constants.values())
        kernel = max(engines[name].steps({"x": x}), key=lambda s: s["macs"])["kernel"]
        print(
            f"{n:>6}x{k:<5} {rows:>4} {name:>8} {kernel:>20} {times[name].p50 / 1e3:>9.1f}"
            f" {stored / times[name].p50:>7.1f} {times[name].speedup_over(times['int8']):>9.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()

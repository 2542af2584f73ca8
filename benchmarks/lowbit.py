"""Linear layers of few rows on codes of 1, 2 and 4 bits beside our own int8, in turns, in one process.

usage: python benchmarks/lowbit.py [--shapes 5632x2048 32000x2048 512x512] [--rows 1] [--threads 2] [--seconds 2]
                                   [--isa avx512vnni] [--floats]

Every contender is a program of one layer: codes in, a linear layer, its rescaling to floats out. The ratio is the
median over rounds of (int8's block median / the packed form's): above 1 the packed form is faster. `GB/s` counts the
bytes of weights as stored. Results are compared with those of the expanded weights before anything is timed.

With --floats activations are float32 and the base is the float32 layer: weights of 16 bits, of levels (fp8, fp6, fp4,
NF4, powers of sqrt(2)) and of integers, one scale for every 64 inputs, decoded in registers.
"""

from __future__ import annotations

import argparse

import numpy as np

from pennyweight.formats import grids
from pennyweight.formats.minifloat import Minifloat
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

FLOATS = ("fp8_e4m3", "fp8_e5m2", "fp6_e3m2", "sqrt2_5", "nf4", "fp4_e2m1")


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


def float_programs(n: int, k: int, rows: int) -> dict[str, Program]:
    """A float layer, and the same with weights stored smaller."""
    rng = np.random.default_rng(0)
    w = rng.standard_normal((n, k)).astype(np.float32)
    halves = {"f16": w.astype(np.float16), "bf16": (w.view(np.uint32) >> 16).astype(np.uint16)}
    scale = Constant("f32", np.full((n, max(k // 64, 1)), 0.1, np.float32))

    def program(constants: dict[str, Constant], ops: list[Op]) -> Program:
        return Program({"x": TensorType("f32", (rows, k))}, ["y"], ops, constants)

    plain = Op("linear_f32", ("x", "w"), ("y",), {}, "layer")
    out = {"f32": program({"w": Constant("f32", w)}, [plain])}
    for name, data in halves.items():
        widen = Op("cast", ("h",), ("w",), {"dtype": "f32"}, "layer")
        out[name] = program({"h": Constant(name, data)}, [widen, plain])
    for name in FLOATS:
        grid = grids[name]
        bits = 4 if grid.bits <= 4 else 8
        known = (grid.table() if isinstance(grid, Minifloat) else grid.levels()).nan_to_num(0, 0, 0).numpy()
        table = np.zeros(1 << bits, np.float32)
        table[: len(known)] = known
        codes = rng.choice(np.flatnonzero(table), (n, k)).astype(np.uint8)
        stored = Constant("u8", codes) if bits == 8 else Constant("u4", codes[:, ::2] | codes[:, 1::2] << 4)
        decode = Op("decode_levels", ("c", "t", "s"), ("w",), {"bits": bits, "shape": [n, k]}, "layer")
        out[name] = program({"c": stored, "t": Constant("f32", table), "s": scale}, [decode, plain])
    for bits in (8, 4):
        high = rng.integers(-127, 128, (n, k), dtype=np.int8)
        pairs = rng.integers(0, 256, (n, k // 2), dtype=np.uint8)
        stored = Constant("i8", high) if bits == 8 else Constant("u4", pairs)
        op = Op("linear_w", ("x", "c", "s"), ("y",), {"bits": bits, "n": k}, "layer")
        out[f"int{bits}"] = program({"c": stored, "s": scale}, [op])
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
    parser.add_argument("--floats", action="store_true")
    args = parser.parse_args()
    print(f"{cpu_name()}, {args.threads} threads, {args.isa or 'strongest instruction set'}")
    print(f"{'shape':>12} {'rows':>4} {'weights':>8} {'kernel':>20} {'us':>9} {'GB/s':>7} {'over first':>10}")
    for shape in args.shapes:
        n, k = (int(s) for s in shape.split("x"))
        for rows in args.rows:
            report(n, k, rows, args)


def report(n: int, k: int, rows: int, args: argparse.Namespace) -> None:
    """One shape."""
    rng = np.random.default_rng(1)
    x = (
        rng.standard_normal((rows, k)).astype(np.float32)
        if args.floats
        else rng.integers(0, 256, (rows, k), dtype=np.uint8)
    )
    engines, calls, made = {}, {}, (float_programs if args.floats else programs)(n, k, rows)
    base = next(iter(made))
    for name, program in made.items():
        engine = engines[name] = Engine(program, threads=args.threads, isa=args.isa)
        plan, y = engine.plan({"x": x.shape}), np.empty((rows, n), np.float32)
        calls[name] = lambda plan=plan, y=y: plan.call([x.ctypes.data], [y.ctypes.data])
        calls[name]()
        if n * k < 20_000_000:
            want = interpret(program, {"x": x})["y"]
            near = np.allclose(y, want, rtol=1e-4, atol=1e-4 * np.abs(want).max()) and args.floats
            if not near and not np.array_equal(y, want):
                raise SystemExit(f"{name} is wrong")
    times = interleaved(calls, seconds=args.seconds, rounds=15)
    for name, program in made.items():
        stored = sum(c.data.nbytes for c in program.constants.values())
        kernel = max(engines[name].steps({"x": x}), key=lambda s: s["macs"])["kernel"]
        print(
            f"{n:>6}x{k:<5} {rows:>4} {name:>8} {kernel:>20} {times[name].p50 / 1e3:>9.1f}"
            f" {stored / times[name].p50:>7.1f} {times[name].speedup_over(times[base]):>9.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()

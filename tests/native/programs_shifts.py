"""Weights of levels, and requantization by shifts: after products whose sums float32 holds, after greater ones, and on raw accumulators."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from cases import F32, Case

from pennyweight.formats import grids
from pennyweight.formats.minifloat import Minifloat
from pennyweight.program.ir import Program

BOUNDS = {"zero": 128, "lo": 0, "hi": 255}
RELU = {"zero": 128, "lo": 128, "hi": 200}


def shifts() -> Iterator[tuple[Case, Program]]:
    for n in (1, 15, 33, 100):  # raw accumulators: ties, extremes, both signs
        case = Case(f"shifts of accumulators n={n}")
        acc = case.rng.integers(-(2**31), 2**31 - 1, (3, n), dtype=np.int32)
        acc[0] = case.rng.integers(-600, 600, n) * 32
        acc[1, : min(n, 4)] = np.array([2**31 - 1, -(2**31), 16, -16], np.int32)[: min(n, 4)]
        a, r = case.input(acc), case.codes(3, n)
        plain = [
            case.op("requant_shift", [a], shift=s, **b) for s in (-8, -1, 0, 1, 6, 23) for b in (BOUNDS, RELU)
        ]
        pairs = ((6, 3), (3, 6), (-8, 23), (23, -8), (-2, -5), (0, 0), (23, 23))
        added = [
            case.op("requant_add_shift", [a, r], shift=s, r_shift=t, r_zero=120, **BOUNDS) for s, t in pairs
        ]
        yield case, case.program(*plain, *added)
    for k, shift in ((64, 10), (4000, 15)):  # of 4000 bytes at their extremes the sums need more than 24 bits
        for residual in (False, True):
            case = Case(f"shifts of a linear layer k={k}{' residual' * residual}")
            x, r = case.codes(5, k, extreme=k > 1000), case.codes(5, 40)
            acc = case.op("linear", [x, case.weight(40, k, extreme=k > 1000), case.bias(40)], zero=128)
            if residual:
                out = case.op("requant_add_shift", [acc, r], shift=shift, r_shift=2, r_zero=128, **BOUNDS)
            else:
                out = case.op("requant_shift", [acc], shift=shift, **RELU)
            yield case, case.program(out)
    for channels, extreme in ((8, False), (300, True)):
        case = Case(f"shifts of convolutions c={channels}")
        shape = {"stride": [1, 1], "pads": [1, 1, 1, 1], "dilation": [1, 1], "groups": 1}
        x = case.codes(1, 6, 5, channels, extreme=extreme)
        weights = [case.weight(16, 3, 3, channels, extreme=extreme), case.weight(16, 3, 3, 16)]
        shapes = [(16, channels, 3, 3), (16, 16, 3, 3)]
        for name, dims in zip(weights, shapes, strict=True):
            held = case.constants[name]
            case.constants[name] = type(held)(held.dtype, np.ascontiguousarray(held.data.reshape(dims)))
        first = case.op("conv", [x, weights[0], case.bias(16)], zero=128, **shape)
        q = case.op("requant_shift", [first], shift=11 if extreme else 8, **BOUNDS)
        second = case.op("conv", [q, weights[1], ""], zero=128, **shape)
        y = case.op("requant_add_shift", [second, q], shift=9, r_shift=1, r_zero=128, **BOUNDS)
        yield case, case.program(y, q)


def levels() -> Iterator[tuple[Case, Program]]:
    for bits, n in ((8, 33), (4, 33), (4, 64)):
        case = Case(f"levels bits={bits} n={n}")
        codes = case.rng.integers(0, 256, (5, n if bits == 8 else -(-n // 2)), dtype=np.uint8)
        table = case.constant(case.rng.standard_normal(1 << bits).astype(F32))
        groups = n // 11 if n % 11 == 0 else 4
        scale = case.constant(case.rng.uniform(0.1, 2, (5, groups)).astype(F32))
        stored = case.constant(codes, "u4" if bits == 4 else "u8")
        weight = case.op("decode_levels", [stored, table, scale], bits=bits, shape=[5, n])
        y = case.op("binary", [case.floats(2, 5, n), weight], fn="add")
        yield case, case.program(y)


def level_products() -> Iterator[tuple[Case, Program]]:
    """Float products whose weights are decoded on the way."""
    for name, bits in (("fp8_e4m3", 8), ("fp8_e5m2", 8), ("fp6_e3m2", 8), ("fp6_e2m3", 8), ("sqrt2_5", 8), ("nf4", 4),
                       ("fp4_e2m1", 4)):  # fmt: skip
        grid = grids[name]
        levels = (grid.table() if isinstance(grid, Minifloat) else grid.levels()).nan_to_num(0, 0, 0).numpy()
        table = np.zeros(1 << bits, F32)
        table[: len(levels)] = levels
        for m, n, k, groups in ((1, 1, 4, 1), (3, 33, 24, 3), (8, 17, 64, 2), (9, 20, 30, 1), (1, 80, 36, 4)):
            case = Case(f"products of {name} {m} {n} {k}")
            codes = case.rng.choice(np.flatnonzero(table), (n, k)).astype(np.uint8)
            codes[0, ::3] = 0
            held = codes if bits == 8 else (codes[:, ::2] | codes[:, 1::2] << 4)
            scale = case.constant(case.rng.uniform(0.1, 2, (n, groups)).astype(F32))
            stored = [case.constant(held, "u4" if bits == 4 else "u8"), case.constant(table), scale]
            x, bias = case.floats(m, k, scale=1), case.constant(case.rng.standard_normal(n).astype(F32))
            weight = case.op("decode_levels", stored, bits=bits, shape=[n, k])
            y = case.op("linear_f32", [x, weight, bias])
            kernel = case.op("decode_levels", stored, bits=bits, shape=[n, k // 2, 2, 1])
            image = case.floats(1, 4, 3, k // 2, scale=1)
            z = case.op(
                "conv_f32", [image, kernel], stride=[1, 1], pads=[0, 0, 0, 0], dilation=[1, 1], groups=1
            )
            yield case, case.program(y, z)

"""Weights of levels, and requantization by shifts: after products whose sums float32 holds, after greater ones, and on raw accumulators."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from cases import F32, Case

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

"""Linear layers with grouped weights, at ragged sizes and extreme values."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from cases import F32, Case

from pennyweight.program.ir import Program


def grouped_case(
    m,
    n,
    groups,
    size,
    *,
    bits=4,
    per_token=True,
    bias=True,
    extreme=False,
    shared=False,
    one_sign=False,
    half=False,
    stored_half=False,
):
    k = groups * size
    case = Case(
        f"grouped m={m} n={n} groups={groups}x{size} bits={bits}{' token' * per_token}"
        f"{' bias' * bias}{' extreme' * extreme}{' shared' * shared}{' one sign' * one_sign}{' half' * half}{' stored' * stored_half}"
    )
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    codes = case.rng.integers(low, high, (n, k), endpoint=True)
    if extreme:
        codes = case.rng.choice(np.array([low, high]), (n, k))
    if one_sign:
        codes = case.rng.integers(low, low // 2, (n, k))
    if bits == 4:
        padded = np.pad(codes, ((0, 0), (0, k % 2)))
        pairs = (padded[:, ::2] & 15) | (padded[:, 1::2] & 15) << 4
        weight = case.constant(pairs.astype(np.uint8), "u4")
    else:
        weight = case.constant(codes.astype(np.int8))
    scales = case.rng.uniform(0.001, 0.1, (1 if shared else n, groups)).astype(F32)
    if half:  # float16 of both signs, smallest, subnormal and largest ones
        scales = scales * case.rng.choice(np.array([-1, 1, 1e-3, -1e-5, 5e-4]), scales.shape)
        scales.flat[: min(3, scales.size)] = np.array([2.0**-24, 65504, -(2.0**-14)])[: scales.size]
        scales = scales.astype(np.float16).astype(F32)
    scale = case.constant(scales.astype(np.float16), "f16") if stored_half else case.constant(scales)
    x = case.floats(*m, k) if isinstance(m, tuple) else case.floats(m, k)
    if extreme:  # every code 255 of a row whose zero point is 0, or 0 of one whose zero point is 255
        case.inputs[x][:] = np.where(np.arange(m)[:, None] % 2, F32(-3), F32(3))
    q, row, zero = case.op("dynamic_quantize", [x], 3, per_token=per_token)
    operands = [q, weight, scale, zero, row]
    operands += [case.constant(case.rng.standard_normal(n).astype(F32))] if bias else []
    return case, case.program(case.op("linear_grouped", operands, bits=bits, n=k))


def grouped() -> Iterator[tuple[Case, Program]]:
    for m in (1, 2, 3, 4, 5, 7, 13):
        yield grouped_case(m, 70, 3, 32)
    for n in (1, 15, 16, 17, 33, 64, 65, 130):
        yield grouped_case(3, n, 2, 32, bias=n % 2 == 0)
    for groups, size in ((1, 1), (5, 3), (2, 7), (4, 16), (3, 33), (2, 64), (2, 100), (40, 32), (1, 1000)):
        yield grouped_case(6, 48, groups, size)
        yield grouped_case(5, 40, groups, size, bits=8, bias=False)
    yield grouped_case(4, 20, 2, 128, extreme=True)
    yield grouped_case(4, 20, 2, 128, bits=8, extreme=True)
    yield grouped_case(9, 33, 4, 32, per_token=False)
    yield grouped_case((2, 3), 33, 4, 32, shared=True)
    yield grouped_case(0, 33, 4, 32)
    yield grouped_case(50, 40, 2, 64)  # rows among threads
    for m in (10, 16, 19, 26, 33):  # tiles of rows, and those too few for one
        yield grouped_case(m, 33, 5, 32, bias=m % 2 == 0)
    for groups, size in (
        (1, 64),
        (3, 128),
        (6, 20),
        (2, 192),
        (5, 18),
        (2, 80),
    ):  # one step of tiles, several, none
        yield grouped_case(17, 40, groups, size)
        yield grouped_case(17, 40, groups, size, bits=8, per_token=False)
    for size in (512, 576, 4096):  # sums of products that a float holds, and larger ones
        yield grouped_case(16, 20, 1, size, bits=8, one_sign=True)
    yield grouped_case(16, 20, 1, 32768, one_sign=True)
    for m in (1, 2, 3, 4, 5, 8, 9, 21):
        yield grouped_case(m, 131, 9, 32, half=True, bias=m % 2 == 1)
    for m, n, groups, size in (
        (1, 64, 3, 4),
        (2, 31, 1, 2052),
        (7, 97, 2, 36),
        (1, 300, 40, 64),
        (12, 65, 1, 2048),
    ):
        yield grouped_case(m, n, groups, size, half=True)
    yield grouped_case(5, 70, 2, 2100, half=True, one_sign=True)  # sums of codes beyond 16 bits
    yield grouped_case(4, 70, 2, 128, half=True, extreme=True)
    yield grouped_case(7, 70, 3, 64, half=True, per_token=False)
    for bits in (4, 8):
        yield grouped_case(5, 70, 3, 32, bits=bits, half=True, stored_half=True)
    yield grouped_case(5, 70, 3, 7, half=True, stored_half=True, shared=True)
    yield grouped_case(400, 130, 2, 32, half=True)  # rows in several pieces
    yield grouped_case(31, 200, 17, 32)  # columns among threads, groups in several passes

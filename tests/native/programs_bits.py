"""Linear layers on packed codes of a few bits, at ragged sizes and extreme values."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
from cases import CODES, F32, Case

from pennyweight.program.ir import Program

TABLES = {
    "binary": (-1, 1),
    "zero-one": (0, 1),
    "far": (127, -128),
    "ternary": (-1, 0, 1, 2),
    "half-odd": (-3, -1, 1, 3),
    "wide": (-128, -43, 42, 127),
    "uneven": (0, 1, 2, 4),  # no steps: stored with four bits
    "powers": (-64, -32, -16, -8, -4, -2, -1, 0, 1, 2, 4, 8, 16, 32, 64, 127),
    "extremes": (-128, 127) * 8,
}


def packed_weight(case: Case, name: str, shape: tuple[int, ...], zeros: int = 0) -> str:
    """An `unpack` op of random codes, with zero points of up to this size."""
    table = np.array(TABLES[name], np.int8)
    bits, n = len(table).bit_length() - 1, int(np.prod(shape[1:]))
    places = case.rng.integers(0, len(table), (shape[0], n))
    padded = np.pad(places, ((0, 0), (0, -n % (8 // bits)))).reshape(shape[0], -1, 8 // bits)
    codes = (padded << np.arange(0, 8, bits)).sum(-1).astype(np.uint8)
    operands = [case.constant(codes), case.constant(table)]
    if zeros:
        operands.append(case.constant(case.rng.integers(-zeros, zeros + 1, shape[0]).astype(np.int8)))
    return case.op("unpack", operands, bits=bits, shape=list(shape))


def bits_case(m, n, k, table, *, tail="rescale", zero=37, extreme=False, dynamic="", lead=()):
    case = Case(f"bits m={m} n={n} k={k} {table} {tail} zero={zero}{' extreme' * extreme} {dynamic} {lead}")
    weight = packed_weight(case, table, (n, k))
    if dynamic:
        x, row, zeros = case.op("dynamic_quantize", [case.floats(m, k)], 3, per_token=dynamic == "token")
        acc = case.op("linear", [x, weight, "", zeros], zero=0)
        bias = case.constant(case.rng.standard_normal(n).astype(F32))
        return case, case.program(case.op("rescale", [acc, case.multiplier(n, k), bias, row]))
    x = case.codes(*lead, m, k, extreme=extreme)
    acc = case.op("linear", [x, weight, case.bias(n)], zero=zero)
    if tail == "acc":
        return case, case.program(acc)
    if tail == "requant":
        return case, case.program(case.op("requant", [acc, case.multiplier(n, k)], **CODES))
    if tail == "residual":
        attrs = {"r_zero": 100, "r_multiplier": 0.37, "zero": 12, "lo": 12, "hi": 250}
        return case, case.program(
            case.op("requant_add", [acc, case.multiplier(n, k), case.codes(*lead, m, n)], **attrs)
        )
    if tail == "concat":  # rows that do not lie side by side
        q = case.op("requant", [acc, case.multiplier(n, k)], **CODES)
        return case, case.program(case.op("max_pool", [joined(case, q, m, n)], **POOL))
    y = case.op("rescale", [acc, case.multiplier(n, k)])
    if tail == "addend":
        y = case.op("binary", [case.floats(*lead, m, n), y], fn="add")
    return case, case.program(y)


POOL = {"kernel": [1], "stride": [1], "pads": [0, 0], "dilation": [1]}


def joined(case, q, m, n):
    other = case.op("quantize", [case.floats(m, n)], scale=0.1, zero=3, lo=0, hi=255)
    both = case.op("concat", [q, other], axis=1)
    return case.op("reshape", [both], shape=[1, m, 2 * n])


def bits() -> Iterator[tuple[Case, Program]]:
    tails = itertools.cycle(["rescale", "requant", "acc", "residual", "addend"])
    for table in TABLES:
        for m, (n, k) in zip(
            (1, 2, 3, 4, 5, 6, 7, 8, 9),
            ((1, 1), (130, 67), (64, 64), (15, 200), (200, 33), (33, 3), (65, 130), (128, 18), (70, 50)),
            strict=True,
        ):
            yield bits_case(m, n, k, table, tail=next(tails))
    for table in ("binary", "ternary", "wide", "powers", "extremes"):
        yield bits_case(1, 70, 2048, table, extreme=True, zero=255, tail="acc")
        yield bits_case(2, 1000, 500, table, dynamic="token")  # columns among threads
        yield bits_case(3, 40, 31, table, dynamic="tensor")
        yield bits_case(2, 40, 31, table, lead=(3,), tail="addend")
        yield bits_case(3, 24, 40, table, tail="concat")
    case = Case("unpacked for all")
    yield case, case.program(packed_weight(case, "ternary", (5, 3, 7)), packed_weight(case, "powers", (4, 9)))
    for zeros, table in ((0, "half-odd"), (2, "ternary"), (127, "extremes")):
        case = Case(f"unpacked for all and a linear layer, zero points up to {zeros}")
        weight = packed_weight(case, table, (5, 9), zeros)
        acc = case.op("linear", [case.codes(2, 9), weight, ""], zero=3)
        yield case, case.program(acc, weight)
    for rows in (1, 9):
        case = Case(f"zero points of a linear layer, {rows} rows")
        acc = case.op(
            "linear", [case.codes(rows, 67), packed_weight(case, "powers", (130, 67), 60), ""], zero=200
        )
        yield case, case.program(acc)

"""Attention over earlier tokens: few and many of them, groups of heads, ragged widths."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from cases import Case

from pennyweight.program.ir import Program


def past_case(n, heads, groups, width, places, count, *, blocks=2, block=1):
    case = Case(
        f"past n={n} heads={heads}/{groups}x{width} places={places} count={count} block={block}/{blocks}"
    )
    q, k, v = (
        case.floats(1, n, heads, width),
        case.floats(1, n, groups, width),
        case.floats(1, n, groups, width),
    )
    past = case.rng.standard_normal((2, blocks, groups, places, width)).astype(np.float32)
    past[..., count:, :] = np.nan  # what nobody may read
    kept, seen = case.input(past), case.input(np.array([count]))
    return case, case.program(case.op("past_attention", [q, k, v, kept, seen], block=block, factor=0.3))


def rounded_case(n, heads, groups, width, places, count):
    case = Case(f"past codes n={n} heads={heads}/{groups}x{width} places={places} count={count}")
    q, k, v = (
        case.floats(1, n, heads, width),
        case.floats(1, n, groups, width),
        case.floats(1, n, groups, width),
    )
    kept = case.codes(2, 2, groups, places, width)
    ranges = np.stack(
        [
            case.rng.uniform(0.01, 0.02, (2, 2, groups, places)),
            case.rng.integers(0, 256, (2, 2, groups, places)),
        ],
        -1,
    )
    ranges[..., count:, :] = np.nan  # what nobody may read
    parts = [case.op("dynamic_quantize", [x], 3, per_token=True) for x in (k, v)]
    operands = [q, *(p for c, s, z in parts for p in (c, s, z)), kept, case.input(ranges.astype(np.float32))]
    return case, case.program(
        case.op("past_attention_q", [*operands, case.input(np.array([count]))], block=1, factor=0.3)
    )


def past() -> Iterator[tuple[Case, Program]]:
    for n in (1, 2, 3, 4, 5, 17, 64, 70):
        yield past_case(n, 6, 2, 24, 9, 7)
    for count in (0, 1, 33):
        yield past_case(1, 4, 4, 16, 33, count)
        yield past_case(6, 4, 4, 16, 33, count, block=0)
    for width in (1, 7, 64, 80, 128):
        yield past_case(2, 5, 1, width, 40, 38)
        yield past_case(12, 5, 1, width, 40, 38)
    yield past_case(3, 2, 2, 8, 0, 0, blocks=1, block=0)
    yield past_case(40, 2, 2, 8, 0, 0, blocks=1, block=0)
    yield past_case(1, 32, 8, 64, 128, 100)  # heads among threads
    yield past_case(33, 8, 4, 32, 64, 50)
    yield past_case(0, 2, 2, 8, 4, 2)
    for n in (1, 3, 5, 70):
        yield rounded_case(n, 6, 2, 24, 9, 7)
    yield rounded_case(1, 16, 4, 64, 70, 70)
    yield rounded_case(9, 4, 4, 16, 12, 0)

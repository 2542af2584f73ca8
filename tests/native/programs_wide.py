"""Linear layers and convolutions on weights of 16 bits, at ragged sizes and at sums next to 2^31."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
from cases import CODES, F32, RAGGED, Case

from pennyweight.program.ir import Program

TAILS = ("requant", "residual", "table", "rescale", "acc", "addend")


def follow(case: Case, acc: str, shape: tuple[int, ...], k: int, tail: str, weight: str) -> str:
    """What comes after an accumulator."""
    n = shape[-1]
    if tail == "acc":
        return acc
    size = float(np.abs(case.constants[weight].data.astype(np.float64)).mean()) + 1
    m = case.constant((case.rng.uniform(0.2, 3.0, n) / (70.0 * size * np.sqrt(k))).astype(F32))
    if tail == "rescale":
        return case.op("rescale", [acc, m])
    if tail == "addend":
        return case.op("binary", [case.op("rescale", [acc, m]), case.floats(*shape)], fn="add")
    if tail == "residual":
        attrs = {"r_zero": 100, "r_multiplier": 0.37, "zero": 12, "lo": 12, "hi": 250}
        return case.op("requant_add", [acc, m, case.codes(*shape)], **attrs)
    q = case.op("requant", [acc, m], **CODES)
    return (
        case.op("table", [q, case.constant(case.rng.integers(0, 256, 256, dtype=np.uint8))])
        if tail == "table"
        else q
    )


def linear(m, n, k, tail, *, extreme=False, zero=37, dynamic="") -> tuple[Case, Program]:
    case = Case(f"wide linear m={m} n={n} k={k} zero={zero} {tail}{' extreme' * extreme} {dynamic}")
    weight = case.wide(n, k, extreme=extreme)
    if dynamic:
        x, row, zeros = case.op("dynamic_quantize", [case.floats(m, k)], 3, per_token=dynamic == "token")
        acc = case.op("linear", [x, weight, "", zeros], zero=0)
        scale, bias = (case.constant(case.rng.standard_normal(n).astype(F32)) for _ in range(2))
        return case, case.program(case.op("rescale", [acc, scale, bias, row]))
    acc = case.op("linear", [case.codes(m, k, extreme=extreme), weight, case.bias(n)], zero=zero)
    return case, case.program(follow(case, acc, (m, n), k, tail, weight))


def conv(x, out, kernel, tail="requant", *, stride=1, pad=0, dilation=1, groups=1, extreme=False, zero=37):
    dims = len(kernel)
    case = Case(
        f"wide conv {x} {out} {kernel} {tail} {stride} {pad} {dilation} {groups}{' extreme' * extreme} {zero}"
    )
    weight = case.wide(out, x[-1] // groups, *kernel, extreme=extreme)
    acc = case.op(
        "conv", [case.codes(*x, extreme=extreme), weight, case.bias(out)], zero=zero, groups=groups,
        stride=[stride] * dims, pads=[pad] * 2 * dims, dilation=[dilation] * dims,
    )  # fmt: skip
    space = [
        (n + 2 * pad - dilation * (f - 1) - 1) // stride + 1 for n, f in zip(x[1:-1], kernel, strict=True)
    ]
    k = x[-1] // groups * int(np.prod(kernel))
    return case, case.program(follow(case, acc, (x[0], *space, out), k, tail, weight))


def wide() -> Iterator[tuple[Case, Program]]:
    """All of them."""
    sizes = [
        *RAGGED,
        (8, 33, 127),
        (37, 70, 45),
    ]
    for (m, n, k), tail in zip(sizes, itertools.cycle(TAILS), strict=False):
        yield linear(m, n, k, tail)
    for tail in TAILS:
        yield linear(9, 50, 21, tail)
    for zero in (0, 255):
        yield linear(6, 24, 200, "acc", extreme=True, zero=zero)
        yield linear(3, 40, 3000, "requant", extreme=True, zero=zero)
    for dynamic in ("token", "tensor"):
        yield linear(11, 50, 37, "", dynamic=dynamic)
        yield linear(1, 260, 500, "", dynamic=dynamic)
    yield conv((1, 5, 6, 3), 16, (3, 3), pad=1)
    yield conv((2, 9, 9, 3), 24, (3, 3), "residual", stride=2, pad=1)
    yield conv((1, 8, 8, 1), 7, (5, 5), "table", pad=2)
    yield conv((2, 7, 7, 20), 33, (3, 3), "rescale", pad=1, zero=255)
    yield conv((1, 6, 11, 16), 40, (1, 1), "acc", extreme=True)
    yield conv((1, 14, 15, 17), 20, (3, 3), "addend", pad=1)
    yield conv((1, 9, 8, 12), 18, (3, 3), "acc", groups=3, pad=1)
    yield conv((1, 7, 7, 8), 8, (3, 3), "requant", groups=8, pad=1)
    yield conv((1, 9, 9, 4), 9, (3, 2), "requant", dilation=2)
    yield conv((2, 13, 6), 10, (4,), "requant", stride=3, pad=2)
    yield conv((1, 4, 5, 6, 3), 5, (2, 3, 2), "rescale", pad=1)

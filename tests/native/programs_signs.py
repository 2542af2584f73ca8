"""Programs on signs: thresholds of every type, products at ragged sizes, every kind of border and epilogue."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
from cases import F32, RAGGED, Case

from pennyweight.program.ir import Program

TAILS = ["acc", "sign", "requant", "rescale", "residual", "addend", "both"]


def bits(case, *shape):
    return case.input(case.rng.integers(0, 256, shape, dtype=np.uint8))


def signs_of(case, *shape, groups=1):
    """Random activations as bits, by way of a threshold."""
    t = case.constant(np.zeros(1, F32))
    return case.op("sign", [case.floats(*shape), t], groups=groups)


def weight(case, n, k):
    return case.constant(case.rng.integers(0, 256, (n, -(-k // 8)), dtype=np.uint8) & last_byte(k))


def last_byte(k):
    mask = np.full(-(-k // 8), 255, np.uint8)
    if k % 8:
        mask[-1] = (1 << (k % 8)) - 1
    return mask


def flips(case, n):
    return case.constant(case.rng.integers(0, 2, n, dtype=np.uint8))


def follow(case, acc, shape, k, tail):
    """What comes after a product of signs of depth k."""
    n, spread = shape[-1], float(np.sqrt(k))
    m = case.constant((case.rng.uniform(10.0, 60.0, n) / spread).astype(F32))
    if tail == "acc":
        return acc
    if tail == "sign":
        t = case.constant(np.rint(case.rng.normal(0, spread, n)).astype(np.int32))
        return case.op("sign", [acc, t, flips(case, n)], groups=1)
    if tail == "requant":
        return case.op("requant", [acc, m], zero=120, lo=3, hi=250)
    if tail == "residual":
        attrs = {"r_zero": 100, "r_multiplier": 0.37, "zero": 12, "lo": 12, "hi": 250}
        return case.op("requant_add", [acc, m, case.codes(*shape)], **attrs)
    y = case.op("rescale", [acc, m, case.constant(case.rng.standard_normal(n).astype(F32))])
    if tail == "rescale":
        return y
    total = case.op("binary", [case.floats(*shape), y], fn="add")
    if tail == "addend":
        return total
    t = case.constant(case.rng.standard_normal(n).astype(F32))
    return total, case.op("sign", [total, t, flips(case, n)] if n % 2 else [total, t], groups=1)


def written(case, results):
    return case, case.program(*(results if isinstance(results, tuple) else (results,)))


def thresholds() -> Iterator[tuple[Case, Program]]:
    for i, (channels, groups) in enumerate([(1, 1), (7, 1), (16, 2), (30, 3), (64, 1), (133, 1), (256, 4)]):
        for kind in ("f32", "u8", "i32"):
            case = Case(f"sign {kind} channels={channels} groups={groups}")
            size = channels if i % 2 else 1
            flip = flips(case, channels) if i % 3 else ""
            if kind == "f32":
                x = case.floats(3, 5, channels)
                next(iter(case.inputs.values())).flat[:4] = [0.0, -0.0, np.nan, np.inf]
                t = case.constant(case.rng.choice(np.array([0.0, 0.5, -1.0], F32), size))
            elif kind == "u8":
                x = case.codes(3, 5, channels)
                t = case.constant(case.rng.integers(0, 256, size, dtype=np.uint8))
            else:
                x = case.input(case.rng.integers(-40, 40, (3, 5, channels), dtype=np.int32))
                t = case.constant(case.rng.integers(-40, 40, size, dtype=np.int32))
            yield case, case.program(case.op("sign", [x, t, flip], groups=groups))


def linears() -> Iterator[tuple[Case, Program]]:
    sizes = [
        *RAGGED,
        (17, 65, 127),
        (16, 80, 1100),
        (3, 33, 8235),
    ]
    for (m, n, k), tail in zip(sizes, itertools.cycle(TAILS)):
        case = Case(f"linear_binary m={m} n={n} k={k} {tail}")
        acc = case.op("linear_binary", [signs_of(case, m, k), weight(case, n, k)], n=k)
        yield written(case, follow(case, acc, (m, n), k, tail))
    for k in (256, 7936, 8192, 16000):  # every bit differs: counts of bytes are as large as they get
        case = Case(f"linear_binary all different k={k}")
        ones = np.broadcast_to(last_byte(k), (5, len(last_byte(k))))
        acc = case.op(
            "linear_binary", [case.input(ones), case.constant(np.zeros((40, ones.shape[1]), np.uint8))], n=k
        )
        yield case, case.program(acc)
    case = Case("linear_binary of stored bits, biased, from an input")
    x = bits(case, 4, 9, 8)
    acc = case.op("linear_binary", [x, weight(case, 40, 64), case.bias(40)], n=64)
    yield case, case.program(follow(case, acc, (4, 9, 40), 64, "rescale"))


# channels, outputs, kernel, stride, pads, dilation, groups
CONVS = [
    (64, 64, (3, 3), 1, 1, 1, 1),
    (16, 16, (3, 3), 1, 1, 1, 1),
    (16, 32, (3, 3), 2, 1, 1, 1),
    (32, 70, (1, 1), 1, 0, 1, 1),
    (32, 64, (1, 1), 2, 0, 1, 1),
    (5, 9, (3, 3), 1, 1, 1, 1),
    (24, 24, (5, 3), 1, 2, 1, 1),
    (8, 40, (3, 3), 1, 2, 2, 1),
    (64, 64, (3, 3), 1, 1, 1, 2),
    (12, 8, (3, 3), 1, 1, 1, 4),
    (32, 32, (3, 3), 2, 1, 1, 32),
    (100, 48, (3, 3), 1, 3, 1, 1),
    (130, 200, (2, 2), 1, 0, 1, 1),
]  # fmt: skip


def convs() -> Iterator[tuple[Case, Program]]:
    tails = itertools.cycle(TAILS)
    for (c, o, kernel, stride, pad, dilation, groups), again in itertools.product(CONVS, range(2)):
        tail = next(tails)
        case = Case(
            f"conv_binary {c}->{o} {kernel} stride={stride} pad={pad} d={dilation} groups={groups} {tail}",
            again,
        )
        size = (7, 9)
        x = signs_of(case, 2, *size, c, groups=groups)
        k = c // groups * kernel[0] * kernel[1]
        attrs = {
            "shape": [o, c // groups, *kernel],
            "stride": [stride] * 2,
            "pads": [pad] * 4,
            "dilation": [dilation] * 2,
            "groups": groups,
        }
        operands = [x, weight(case, o, k), case.bias(o)] if again else [x, weight(case, o, k)]
        acc = case.op("conv_binary", operands, **attrs)
        out = [
            (s + 2 * pad - dilation * (n - 1) - 1) // stride + 1 for s, n in zip(size, kernel, strict=True)
        ]
        yield written(case, follow(case, acc, (2, *out, o), k, tail))
    for dims in (1, 3):
        case = Case(f"conv_binary in {dims} dimensions")
        x = signs_of(case, 2, *[5] * dims, 20)
        attrs = {"stride": [1] * dims, "pads": [1] * (2 * dims), "dilation": [1] * dims, "groups": 1}
        acc = case.op(
            "conv_binary", [x, weight(case, 24, 20 * 3**dims)], shape=[24, 20, *[3] * dims], **attrs
        )
        yield case, case.program(acc)


def lines() -> Iterator[tuple[Case, Program]]:
    """Long rows of pixels, of 16 bits and more, with every tail."""
    shapes = [(16, 16, 3, 37), (12, 33, 5, 20), (16, 7, 1, 19), (32, 47, 3, 23), (64, 64, 3, 12)]
    for (c, o, size, width), tail in itertools.product(shapes, TAILS):
        case = Case(f"conv_binary {c}->{o} {size} x {size} on lines of {width} {tail}")
        pad = size // 2
        attrs = {"stride": [1, 1], "pads": [pad] * 4, "dilation": [1, 1], "groups": 1}
        operands = [signs_of(case, 1, 4, width, c), weight(case, o, c * size**2), case.bias(o)]
        acc = case.op("conv_binary", operands, shape=[o, c, size, size], **attrs)
        yield written(case, follow(case, acc, (1, 4, width, o), c * size**2, tail))


def chains() -> Iterator[tuple[Case, Program]]:
    """Layer after layer on bits, with padding that differs, and codes that become bits."""
    case = Case("signs from layer to layer")
    q = case.codes(1, 12, 11, 32)
    x = case.op("sign", [q, case.constant(np.full(1, 128, np.uint8))], groups=1)
    plain = {"stride": [1, 1], "dilation": [1, 1], "groups": 1}
    for o, c, size, pad in ((64, 32, 3, 1), (32, 64, 1, 0), (64, 32, 5, 2)):
        w = weight(case, o, c * size * size)
        acc = case.op("conv_binary", [x, w], shape=[o, c, size, size], pads=[pad] * 4, **plain)
        t = case.constant(case.rng.integers(-9, 9, o, dtype=np.int32))
        x = case.op("sign", [acc, t, flips(case, o)], groups=1)
    flat = case.op("reshape", [x], shape=[1, 12 * 11 * 8])
    yield case, case.program(case.op("linear_binary", [flat, weight(case, 10, 12 * 11 * 64)], n=12 * 11 * 64))


def shortcuts() -> Iterator[tuple[Case, Program]]:
    """Floats added to products: made after them, made before, and read again later."""
    for n in (16, 24, 64):
        case = Case(f"shortcuts of {n} channels by products of signs")
        shape = (1, 9, 17, n)
        attrs = {"shape": [n, n, 3, 3], "stride": [1, 1], "pads": [1] * 4, "dilation": [1, 1], "groups": 1}
        x = first = case.floats(*shape)
        sums = []
        for late in (True, False, False, True):
            t = case.constant(case.rng.standard_normal(n).astype(F32))
            bits = case.op("sign", [x, t], groups=1)
            acc = case.op("conv_binary", [bits, weight(case, n, 9 * n)], **attrs)
            y = case.op("rescale", [acc, case.constant(case.rng.uniform(0.01, 0.1, n).astype(F32))])
            x = case.op("binary", [y, case.op("binary", [first, x], fn="mul") if late else x], fn="add")
            sums.append(x)
        yield case, case.program(case.op("binary", [sums[1], sums[3]], fn="add"))


def signs() -> Iterator[tuple[Case, Program]]:
    """All of them."""
    yield from thresholds()
    yield from linears()
    yield from convs()
    yield from lines()
    yield from shortcuts()
    yield from chains()

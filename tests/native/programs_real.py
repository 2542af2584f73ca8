"""Float products with all that may follow them, at sizes that divide nothing."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
from cases import F32, Case

from pennyweight.program.ir import Program

TAILS = ("", "add", "clip", "add clip", "gelu", "added silu", "clip add")


def real(case, *shape):
    """A stored tensor whose products stay near 1."""
    return case.constant((case.rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(F32))


def follow(case, y, shape, tail):
    """What comes after a product; "added": it is the second operand of the sum."""
    for step in tail.split():
        if step in ("add", "added"):
            other = case.floats(*shape, scale=1)
            y = case.op("binary", [y, other] if step == "add" else [other, y], fn="add")
        elif step == "clip":
            y = case.op("unary", [y], fn="clip", p=-0.5, q=float("inf"))
        else:
            y = case.op("unary", [y], fn=step, p=0.0, q=0.0)
    return y


def linears() -> Iterator[tuple[Case, Program]]:
    sizes = [
        (1, 1, 1),
        (1, 64, 40),
        (2, 100, 7),
        (3, 15, 64),
        (5, 17, 3),
        (6, 130, 33),
        (13, 16, 20),
        (14, 33, 9),
    ]
    sizes += [(15, 48, 5), (27, 31, 12), (29, 65, 77), (64, 96, 64), (230, 40, 30), (3, 260, 300)]
    for (m, n, k), tail in zip(sizes, itertools.cycle(TAILS)):
        case = Case(f"real linear {m} {n} {k} {tail}")
        bias = case.constant(case.rng.standard_normal(n).astype(F32)) if k % 3 else ""
        y = case.op("linear_f32", [case.floats(m, k, scale=1), real(case, n, k), bias])
        yield case, case.program(follow(case, y, (m, n), tail))
    case = Case("real linear before a padded convolution")
    y = case.op("linear_f32", [case.floats(2, 5, 6, 7, scale=1), real(case, 20, 7)])
    y = follow(case, y, (2, 5, 6, 20), "add clip")
    attrs = {"stride": [1, 1], "pads": [1, 2, 1, 0], "dilation": [1, 1], "groups": 1}
    yield case, case.program(case.op("conv_f32", [y, real(case, 9, 20, 3, 3)], **attrs))


def conv(case, x, shape, out, kernel, stride=1, dilation=1, groups=1, pad=1):
    """A convolution of square windows and its result's shape."""
    dims = len(shape) - 2
    attrs = {
        "stride": [stride] * dims, "pads": [pad] * (2 * dims), "dilation": [dilation] * dims, "groups": groups,
    }  # fmt: skip
    y = case.op(
        "conv_f32",
        [x, real(case, out, shape[-1] // groups, *[kernel] * dims), case.constant(case.rng.standard_normal(out).astype(F32))],
        **attrs,
    )  # fmt: skip
    return y, (
        shape[0],
        *((n + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1 for n in shape[1:-1]),
        out,
    )


def convolutions() -> Iterator[tuple[Case, Program]]:
    plain = [
        ((1, 9, 8, 3), 16, {"kernel": 7, "stride": 2, "pad": 3}),
        ((2, 6, 7, 20), 33, {"kernel": 3}),
        ((1, 9, 9, 32), 40, {"kernel": 3, "stride": 2}),
        ((1, 12, 11, 5), 6, {"kernel": 3, "dilation": 2}),
        ((1, 8, 8, 24), 36, {"kernel": 3, "groups": 3}),
        ((3, 5, 5, 17), 64, {"kernel": 1, "pad": 0}),
        ((1, 16, 16, 24), 48, {"kernel": 3}),
        ((2, 30, 8), 12, {"kernel": 5, "pad": 2}),
        ((1, 4, 5, 6, 4), 18, {"kernel": 3}),
    ]
    depthwise = [
        ((1, 7, 9, 3), 3, {"kernel": 3}),
        ((2, 9, 20, 16), 16, {"kernel": 3, "stride": 2}),
        ((1, 14, 14, 24), 24, {"kernel": 5, "pad": 2}),
        ((1, 17, 33, 40), 40, {"kernel": 3, "dilation": 2, "pad": 2}),
        ((2, 25, 10), 10, {"kernel": 3}),
    ]
    for (shape, out, how), tail in zip(plain + depthwise * 2, itertools.cycle(TAILS)):
        groups = shape[-1] if shape[-1] == out and (shape, out, how) in depthwise else how.get("groups", 1)
        case = Case(f"real convolution {shape} {out} {how} {tail}")
        y, found = conv(case, case.floats(*shape, scale=1), shape, out, **{**how, "groups": groups})
        yield case, case.program(follow(case, y, found, tail))
    case = Case("real residual block")
    shape = (1, 8, 8, 24)
    x = case.floats(*shape, scale=1)
    first, shape = conv(case, x, shape, 32, 3)
    first = follow(case, first, shape, "clip")
    second, _ = conv(case, first, shape, 32, 3)
    total = follow(case, case.op("binary", [second, first], fn="add"), shape, "clip")
    last, _ = conv(case, total, shape, 32, 3, groups=32)
    yield case, case.program(case.op("binary", [last, total], fn="add"), last)


def attentions() -> Iterator[tuple[Case, Program]]:
    for (n, t, s, d, e), transposed, kept in (
        ((3, 5, 7, 8, 6), True, (0, 1, 2)),
        ((2, 70, 33, 32, 16), True, (0, 1, 2)),
        ((1, 130, 64, 24, 40), False, (0, 1, 2)),
        ((2, 67, 35, 8, 6), True, (0,)),
        ((2, 6, 48, 16, 8), False, (1,)),
        ((1, 11, 20, 8, 16), True, (2,)),
        ((1, 9, 37, 8, 16), True, ()),
    ):
        case = Case(f"real attention {t} {s} {transposed}")
        keys = case.floats(n, 2, *((s, d) if transposed else (d, s)), scale=1)
        scores = case.op("matmul_f32", [case.floats(n, 2, t, d, scale=1), keys], transpose_b=transposed)
        scores = case.op("unary", [scores], fn="mul", p=0.3, q=0.0)
        masks = (n, 1, 1, s), (t, s), (n, 2, t, 1)
        for i in kept:
            scores = case.op("binary", [scores, case.floats(*masks[i])], fn="add")
        values = case.floats(n, 1, s, e, scale=1)
        y = case.op("matmul_f32", [case.op("softmax", [scores]), values], transpose_b=False)
        yield case, case.program(follow(case, y, (n, 2, t, e), "add clip"))
    case = Case("real matrices before a padded convolution")
    y = case.op("matmul_f32", [case.floats(1, 4, 5, 6), case.floats(1, 1, 6, 8)], transpose_b=False)
    attrs = {"stride": [1, 1], "pads": [1, 1, 1, 1], "dilation": [1, 1], "groups": 1}
    yield (
        case,
        case.program(
            case.op("conv_f32", [follow(case, y, (1, 4, 5, 8), "clip"), real(case, 5, 8, 3, 3)], **attrs)
        ),
    )


def half(case, x):
    """A value rounded to bf16."""
    return case.op("cast", [x], dtype="bf16")


def stored_half(case, *shape):
    """A stored bf16 tensor."""
    values = (case.rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(F32)
    return case.constant((values.view(np.uint32) >> 16).astype(np.uint16), "bf16")


def halves() -> Iterator[tuple[Case, Program]]:
    """Products of bf16 numbers, summed and returned in f32: what follows may be rounded by the caller."""
    sizes = [
        (1, 1, 1),
        (1, 70, 40),
        (3, 15, 64),
        (5, 17, 3),
        (16, 33, 33),
        (17, 100, 18),
        (33, 64, 96),
        (50, 31, 24),
    ]
    sizes += [(128, 48, 160), (300, 40, 36), (14, 260, 300)]
    for (m, n, k), tail in zip(sizes, itertools.cycle(TAILS)):
        case = Case(f"half linear {m} {n} {k} {tail}")
        x = half(case, case.floats(m, k, scale=1))
        bias = case.constant(case.rng.standard_normal(n).astype(F32)) if k % 3 else ""
        yield (
            case,
            case.program(
                follow(case, case.op("linear_f32", [x, stored_half(case, n, k), bias]), (m, n), tail)
            ),
        )
    windows = [
        ((1, 12, 11, 3), 16, 7, 2, 3, 1), ((2, 14, 14, 16), 33, 3, 1, 1, 1), ((1, 9, 9, 24), 40, 3, 2, 1, 1),
        ((1, 7, 7, 48), 64, 1, 1, 0, 1), ((1, 30, 28, 5), 12, 3, 1, 1, 1), ((1, 8, 8, 24), 36, 3, 1, 1, 3),
        ((1, 17, 19, 40), 40, 3, 1, 1, 40), ((2, 9, 8, 10), 10, 5, 2, 2, 10), ((1, 56, 20, 32), 16, 3, 1, 1, 1),
    ]  # fmt: skip
    for (shape, out, kernel, stride, pad, groups), tail in zip(windows, itertools.cycle(TAILS)):
        case = Case(f"half convolution {shape} {out} {kernel} {stride} {groups} {tail}")
        x, w = (
            half(case, case.floats(*shape, scale=1)),
            stored_half(case, out, shape[-1] // groups, kernel, kernel),
        )
        attrs = {"stride": [stride] * 2, "pads": [pad] * 4, "dilation": [1, 1], "groups": groups}
        found = (shape[0], *((n + 2 * pad - kernel) // stride + 1 for n in shape[1:-1]), out)
        yield case, case.program(follow(case, case.op("conv_f32", [x, w], **attrs), found, tail))
    for (n, m, j, k), transposed in (((3, 5, 7, 9), True), ((2, 40, 33, 32), False), ((1, 20, 48, 26), True)):
        case = Case(f"half matrices {m} {j} {k} {transposed}")
        right = half(case, case.floats(1, *((j, k) if transposed else (k, j)), scale=1))
        left = half(case, case.floats(n, m, k, scale=1))
        yield case, case.program(case.op("matmul_f32", [left, right], transpose_b=transposed))


def roundings() -> Iterator[tuple[Case, Program]]:
    """bf16 between products: a sum next to a tie may round the other way."""
    for tail in ("", "add", "clip", "add clip", "gelu"):
        case = Case(f"rounded linear {tail}")
        y = case.op("linear_f32", [half(case, case.floats(70, 40, scale=1)), stored_half(case, 48, 40)])
        y = half(case, follow(case, y, (70, 48), tail))
        yield case, case.program(case.op("cast", [y], dtype="f32"))
    case = Case("rounded residual block")
    attrs = {"stride": [1, 1], "pads": [1, 1, 1, 1], "dilation": [1, 1], "groups": 1}
    x = half(case, case.floats(1, 10, 10, 32, scale=1))
    y = case.op("conv_f32", [x, stored_half(case, 32, 32, 3, 3)], **attrs)
    y = half(case, follow(case, y, (1, 10, 10, 32), "gelu"))
    y = case.op("conv_f32", [y, stored_half(case, 32, 1, 3, 3)], **{**attrs, "groups": 32})
    y = half(case, case.op("unary", [y], fn="silu", p=0.0, q=0.0))
    y = case.op("conv_f32", [y, stored_half(case, 32, 32, 3, 3)], **attrs)
    y = case.op("binary", [y, case.op("cast", [x], dtype="f32")], fn="add")
    y = half(case, case.op("unary", [y], fn="clip", p=0.0, q=6.0))
    yield case, case.program(case.op("cast", [y], dtype="f32"), case.op("cast", [x], dtype="f32"))
    for n, t, s, d in ((2, 70, 33, 32), (1, 64, 128, 24)):
        case = Case(f"rounded attention {t} {s} {d}")
        q, k, v = (half(case, case.floats(n, 2, rows, d, scale=1)) for rows in (t, s, s))
        scores = case.op("unary", [case.op("matmul_f32", [q, k], transpose_b=True)], fn="mul", p=0.2, q=0.0)
        shares = half(
            case, case.op("softmax", [case.op("binary", [scores, case.floats(n, 1, 1, s)], fn="add")])
        )
        y = half(case, case.op("matmul_f32", [shares, v], transpose_b=False))
        yield case, case.program(case.op("cast", [y], dtype="f32"))
    case = Case("rounded layer norm")
    x = case.op("linear_f32", [half(case, case.floats(9, 40, scale=1)), stored_half(case, 40, 40)])
    normed = case.op("layer_norm", [x, "", ""], eps=1e-5)
    y = case.op("linear_f32", [half(case, normed), stored_half(case, 24, 40)])
    yield case, case.program(y, normed)


def conversions() -> Iterator[tuple[Case, Program]]:
    """Casts to bf16 and back, and what moves such numbers: exact."""
    case = Case("conversions of every kind of number")
    bits = np.arange(0, 2**32, 2**32 // 60013, dtype=np.uint64).astype(np.uint32)
    ties = (np.arange(0x3F00, 0x4100, dtype=np.uint32) << 16) + 0x8000
    x = case.input(np.concatenate([bits, ties, ties + 1, ties - 1]).view(F32)[:60007])
    yield case, case.program(case.op("cast", [half(case, x)], dtype="f32"))
    case = Case("moves of halves")
    x = case.input(np.maximum(case.rng.standard_normal((2, 9, 8, 21)), -2).astype(F32))
    h = half(case, x)
    pooled = case.op("max_pool", [h], kernel=[3, 2], stride=[2, 2], pads=[1, 0, 1, 1], dilation=[1, 1])
    turned = case.op("transpose", [h], perm=[0, 3, 1, 2])
    part = case.op("slice", [turned], starts=[0, 1, 0, 2], stops=[2, 21, 9, 8], steps=[1, 2, 3, 1])
    joined = case.op("concat", [half(case, case.floats(2, 9, 8, 4)), h], axis=3)
    flat = case.op("reshape", [half(case, case.floats(3, 4, 5))], shape=[12, 5])
    values = [case.op("cast", [v], dtype="f32") for v in (pooled, part, joined, flat)]
    yield case, case.program(*values)


def reals() -> Iterator[tuple[Case, Program]]:
    """All of them."""
    yield from linears()
    yield from convolutions()
    yield from attentions()
    yield from halves()

"""Small programs that reach every op and every kernel, at ragged sizes and extreme values."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
from cases import CODES, F32, RAGGED, Case
from programs_bits import bits
from programs_grouped import grouped
from programs_movement import attentions, inexact, movements, normalisations, pools, recurrents, sums
from programs_shifts import levels, shifts
from programs_signs import signs
from programs_wide import wide

from pennyweight.program.ir import Program


def linear_case(m, n, k, *, zero=37, extreme=False, tail="requant", dynamic="", bias=True):
    case = Case(
        f"linear m={m} n={n} k={k} zero={zero} {tail}{' extreme' * extreme}{' ' + dynamic if dynamic else ''}"
    )
    if dynamic:
        x, row, zeros = case.op("dynamic_quantize", [case.floats(m, k)], 3, per_token=dynamic == "token")
        acc = case.op("linear", [x, case.weight(n, k), "", zeros], zero=0)
        out = case.op(
            "rescale",
            [acc, case.multiplier(n, k), case.constant(case.rng.standard_normal(n).astype(F32)), row],
        )
        return case, case.program(out)
    x = case.codes(m, k, extreme=extreme)
    acc = case.op("linear", [x, case.weight(n, k, extreme=extreme), case.bias(n) if bias else ""], zero=zero)
    return case, case.program(follow(case, acc, (m, n), k, tail))


def follow(case, acc, shape, k, tail):
    """What comes after an accumulator."""
    n = shape[-1]
    if tail == "acc":
        return acc
    if tail == "rescale":
        return case.op("rescale", [acc, case.multiplier(n, k)])
    if tail == "addend":
        y = case.op("rescale", [acc, case.multiplier(n, k)])
        return case.op("binary", [case.floats(*shape), y], fn="add")
    if tail == "residual":
        attrs = {"r_zero": 100, "r_multiplier": 0.37, "zero": 12, "lo": 12, "hi": 250}
        return case.op("requant_add", [acc, case.multiplier(n, k), case.codes(*shape)], **attrs)
    q = case.op("requant", [acc, case.multiplier(1 if tail == "one" else n, k)], **CODES)
    if tail == "table":
        return case.op("table", [q, case.constant(case.rng.integers(0, 256, 256, dtype=np.uint8))])
    if tail == "whole":  # all codes, zero point 0: saturation clamps
        return case.op("requant", [acc, case.multiplier(n, k)], zero=0, lo=0, hi=255)
    if tail == "clamped":
        return case.op("requant", [acc, case.multiplier(n, k)], zero=128, lo=100, hi=180)
    return q


def linears() -> Iterator[tuple[Case, Program]]:
    sizes = [
        *RAGGED,
        (15, 65, 127),
        (16, 80, 63),
    ]
    sizes += [(17, 33, 192), (31, 96, 5), (33, 63, 200), (49, 112, 17), (70, 20, 129), (6, 64, 64)]
    for (m, n, k), tail in zip(
        sizes, itertools.cycle(["requant", "residual", "table", "rescale", "acc", "addend"])
    ):
        yield linear_case(m, n, k, tail=tail)
    for tail in ("requant", "residual", "table", "rescale", "acc", "addend", "clamped", "one"):
        yield linear_case(37, 70, 45, tail=tail)
    # every width of a strip of columns, whole, half and odd; more rows than one pass over a strip, and a rest
    for n, tail in itertools.product((8, 16, 24, 30, 32, 40, 48, 56, 64, 96, 104), ("whole", "residual")):
        yield linear_case(75, n, 20, tail=tail)
    for zero in (0, 255):
        yield linear_case(19, 66, 100, zero=zero, bias=False)
    yield linear_case(9, 40, 1000, extreme=True)
    yield linear_case(40, 64, 2048, extreme=True, zero=0, tail="acc")
    for m, n, k in ((1, 16, 64), (5, 40, 130), (33, 70, 203)):  # neighbours that 16 bits hold, but for a few
        case = Case(f"linear m={m} n={n} k={k} trained")
        x = case.codes(m, k, extreme=True)
        yield case, case.program(case.op("linear", [x, case.trained(n, k), case.bias(n)], zero=3))
    for dynamic in ("token", "tensor"):
        yield linear_case(11, 50, 37, dynamic=dynamic)
        yield linear_case(1, 96, 130, dynamic=dynamic)


def conv_case(
    x, out, kernel, *, stride=1, pads=None, dilation=1, groups=1, tail="requant", zero=37, extreme=False
):
    dims = len(kernel)
    spread = lambda v: [v] * dims if isinstance(v, int) else list(v)  # noqa: E731
    pads = [0] * 2 * dims if pads is None else spread(pads) * 2 if isinstance(pads, int) else list(pads)
    attrs = {"stride": spread(stride), "pads": pads, "dilation": spread(dilation), "groups": groups}
    case = Case(f"conv x={x} out={out} kernel={kernel} {attrs} zero={zero} {tail}{' extreme' * extreme}")
    channels = x[-1] // groups
    k = channels * int(np.prod(kernel))
    acc = case.op(
        "conv", [case.codes(*x, extreme=extreme), case.weight(out, channels, *kernel, extreme=extreme), case.bias(out)],
        zero=zero, **attrs,
    )  # fmt: skip
    space = [
        (n + pads[i] + pads[dims + i] - spread(dilation)[i] * (kernel[i] - 1) - 1) // spread(stride)[i] + 1
        for i, n in enumerate(x[1:-1])
    ]
    return case, case.program(follow(case, acc, (x[0], *space, out), k, tail))


def convs() -> Iterator[tuple[Case, Program]]:
    yield conv_case((1, 5, 6, 3), 16, (3, 3), pads=1)
    yield conv_case((2, 9, 9, 3), 24, (3, 3), stride=2, pads=1)
    yield conv_case((1, 15, 14, 3), 40, (7, 7), stride=2, pads=3, tail="clamped")
    yield conv_case((1, 8, 8, 1), 7, (5, 5), pads=2, tail="table")
    yield conv_case((2, 7, 7, 64), 64, (3, 3), pads=1, tail="residual")
    yield conv_case((1, 14, 14, 17), 33, (3, 3), pads=1, tail="rescale")
    yield conv_case((1, 14, 14, 64), 48, (3, 3), stride=2, pads=1)
    yield conv_case((1, 10, 9, 20), 16, (3, 3), dilation=2, pads=2, tail="acc")
    yield conv_case((3, 6, 6, 65), 80, (1, 1), tail="residual")
    yield conv_case((1, 9, 9, 32), 40, (1, 1), stride=2)
    yield conv_case((1, 8, 8, 12), 18, (3, 3), groups=3, pads=1, tail="residual")
    yield conv_case((1, 8, 8, 8), 16, (3, 2), groups=8, pads=(1, 0, 1, 1))
    yield conv_case((1, 6, 7, 4), 5, (3, 3), pads=(0, 2, 1, 0), zero=0)
    yield conv_case((2, 19, 6), 10, (3,), pads=1)
    yield conv_case((1, 21, 6), 12, (5,), stride=3, dilation=2, pads=(2, 3), tail="rescale")
    yield conv_case((1, 4, 5, 6, 3), 8, (3, 3, 3), pads=1, tail="requant")
    yield conv_case((1, 5, 5, 5, 4), 6, (1, 2, 3), stride=(1, 2, 1), tail="residual")
    yield conv_case((1, 6, 6, 64), 32, (3, 3), pads=1, extreme=True, zero=255, tail="acc")
    yield conv_case((0, 5, 5, 3), 8, (3, 3), pads=1)
    for groups in (1, 2):
        case = Case(f"conv trained groups={groups}")
        window = {"stride": [1, 1], "pads": [1, 1, 1, 1], "dilation": [1, 1], "groups": groups, "zero": 9}
        operands = [
            case.codes(1, 9, 8, 22, extreme=True),
            case.trained(34, 22 // groups, 3, 3),
            case.bias(34),
        ]
        yield case, case.program(case.op("conv", operands, **window))
    for channels, kernel, stride, tail in [
        (2, (3, 3), 1, "requant"), (3, (3, 3), 2, "residual"), (8, (3, 3), 1, "table"), (16, (3, 3), 1, "requant"),
        (24, (5, 5), 1, "clamped"), (32, (3, 3), 1, "requant"), (32, (3, 3), 2, "rescale"), (48, (7, 7), 1, "acc"),
        (64, (3, 3), 1, "residual"), (65, (5, 5), 2, "requant"), (96, (3, 3), 3, "table"), (130, (7, 7), 2, "requant"),
        (40, (2, 3), 1, "requant"), (16, (9, 1), 1, "rescale"), (64, (3, 3), 1, "requant"), (16, (3, 3), 1, "residual"),
    ]:  # fmt: skip
        pads = [k // 2 for k in kernel] * 2
        yield conv_case(
            (2, 11, 12, channels), channels, kernel, stride=stride, pads=pads, groups=channels, tail=tail
        )
    for channels, stride, (h, w), tail in [
        (16, 1, (4, 4), "whole"), (32, 1, (5, 2), "whole"), (64, 1, (3, 1), "whole"), (16, 2, (9, 13), "requant"),
        (96, 2, (9, 9), "whole"), (144, 1, (6, 7), "whole"), (144, 2, (8, 8), "requant"), (96, 1, (5, 10), "requant"),
        (32, 2, (7, 5), "whole"), (192, 1, (1, 3), "whole"), (80, (2, 1), (7, 6), "whole"), (64, (1, 2), (4, 9), "whole"),
    ]:  # fmt: skip
        yield conv_case(
            (1, h, w, channels), channels, (3, 3), stride=stride, pads=1, groups=channels, tail=tail
        )
    yield conv_case((1, 9, 13, 33), 33, (3, 3), dilation=2, pads=2, groups=33)
    yield conv_case((1, 7, 30), 30, (3,), pads=1, groups=30)
    yield conv_case((1, 6, 9, 70), 70, (3, 3), pads=1, groups=70, extreme=True, zero=255)


def packings() -> Iterator[tuple[Case, Program]]:
    """Weights that many threads pack: of several shares, the last one short; columns over 16, rows over 4, taps."""
    yield linear_case(3, 1003, 517)
    yield linear_case(5, 37, 4099, extreme=True)
    yield conv_case((1, 9, 7, 70), 133, (3, 3), pads=1)
    yield conv_case((2, 6, 6, 67), 45, (3, 3), stride=2, pads=1, extreme=True)


def dynamic_convs() -> Iterator[tuple[Case, Program]]:
    for name, shape, weight, groups in (
        ("plain", (2, 7, 6, 5), (12, 5, 3, 3), 1),
        ("depthwise", (1, 8, 8, 20), (20, 1, 3, 3), 20),
    ):
        case = Case(f"dynamic conv {name}")
        x, row, zero = case.op("dynamic_quantize", [case.floats(*shape)], 3, per_token=False)
        attrs = {"stride": [1, 1], "pads": [1, 1, 1, 1], "dilation": [1, 1], "groups": groups}
        acc = case.op("conv", [x, case.weight(*weight), "", zero], zero=0, **attrs)
        out = case.op("rescale", [acc, case.multiplier(weight[0], 9), "", row])
        yield case, case.program(out)


def chains() -> Iterator[tuple[Case, Program]]:
    """Places in memory: padding kept around values, concatenation in place, several readers, reshapes."""
    case = Case("residual block with padding")
    same = {"stride": [1, 1], "pads": [1, 1, 1, 1], "dilation": [1, 1], "groups": 1}
    x = case.op("quantize", [case.floats(2, 3, 9, 8)], scale=0.05, **CODES)
    x = case.op("transpose", [x], perm=[0, 2, 3, 1])
    a = case.op(
        "requant",
        [case.op("conv", [x, case.weight(16, 3, 3, 3), ""], zero=7, **same), case.multiplier(16, 27)],
        **CODES,
    )
    b = case.op(
        "requant",
        [case.op("conv", [a, case.weight(16, 16, 3, 3), ""], zero=7, **same), case.multiplier(16, 144)],
        **CODES,
    )
    acc = case.op("conv", [b, case.weight(16, 16, 3, 3), ""], zero=7, **same)
    c = case.op("requant_add", [acc, case.multiplier(16, 144), a], r_zero=7, r_multiplier=0.8, **CODES)
    d = case.op("conv", [c, case.weight(8, 16, 3, 3), ""], zero=7, **same)
    yield case, case.program(d, case.op("dequantize", [c], scale=0.1, zero=7))

    case = Case("concatenation in place")
    x = case.codes(1, 6, 6, 16)
    one = {"stride": [1, 1], "pads": [0, 0, 0, 0], "dilation": [1, 1], "groups": 1}
    parts = []
    for n, kernel, attrs in ((24, 1, one), (17, 3, same), (7, 3, same)):
        acc = case.op("conv", [x, case.weight(n, 16, kernel, kernel), case.bias(n)], zero=7, **attrs)
        parts.append(case.op("requant", [acc, case.multiplier(n, 16 * kernel * kernel)], **CODES))
    joined = case.op("concat", parts, axis=3)
    pooled = case.op("max_pool", [joined], kernel=[3, 3], stride=[1, 1], pads=[1, 1, 1, 1], dilation=[1, 1])
    acc = case.op("conv", [joined, case.weight(10, 48, 3, 3), ""], zero=7, **same)
    both = case.op("concat", [pooled, case.op("requant", [acc, case.multiplier(10, 432)], **CODES)], axis=3)
    depth = {**same, "groups": 58}
    acc = case.op("conv", [both, case.weight(58, 1, 3, 3), ""], zero=7, **depth)
    yield case, case.program(case.op("requant", [acc, case.multiplier(58, 9)], **CODES), parts[1])

    case = Case("accumulator with two readers")
    acc = case.op("linear", [case.codes(9, 20), case.weight(30, 20), case.bias(30)], zero=3)
    q = case.op("requant", [acc, case.multiplier(30, 20)], **CODES)
    f = case.op(
        "rescale", [acc, case.multiplier(30, 20), case.constant(case.rng.standard_normal(30).astype(F32))]
    )
    r = case.op("requant_add", [acc, case.multiplier(1, 20), q], r_zero=9, r_multiplier=0.5, **CODES)
    yield case, case.program(q, f, r)

    case = Case("reshapes and transposes")
    x = case.codes(2, 5, 12)
    y = case.op("transpose", [case.op("reshape", [x], shape=[2, 5, 3, 4])], perm=[0, 2, 1, 3])
    z = case.op("reshape", [case.op("transpose", [y], perm=[0, 2, 1, 3])], shape=[10, 12])
    acc = case.op("linear", [z, case.weight(6, 12), ""], zero=5)
    yield case, case.program(y, case.op("requant", [acc, case.multiplier(6, 12)], **CODES))

    case = Case("upsampling, stuffing, slices and padding before convolutions")
    x = case.codes(1, 5, 5, 6)
    up = case.op("upsample", [x], repeats=[1, 2, 2, 1])
    a = case.op(
        "requant",
        [case.op("conv", [up, case.weight(6, 6, 3, 3), ""], zero=7, **same), case.multiplier(6, 54)],
        **CODES,
    )
    stuffed = case.op("stuff", [x], factors=[1, 2, 2, 1], value=7)
    wide = {**same, "pads": [2, 2, 3, 3]}
    b = case.op(
        "requant",
        [case.op("conv", [stuffed, case.weight(6, 6, 3, 3), ""], zero=7, **wide), case.multiplier(6, 54)],
        **CODES,
    )
    cut = case.op("slice", [a], starts=[0, 0, 1, 0], stops=[1, 10, 10, 6], steps=[1, 2, 3, 1])
    padded = case.op("pad", [cut], pads=[0, 1, 0, 2, 0, 1, 2, 0], value=9)
    d = case.op("conv", [padded, case.weight(4, 8, 3, 3), ""], zero=7, **same)
    yield case, case.program(d, b, up)

    case = Case("an output that others read")
    x = case.codes(4, 16)
    q = case.op(
        "requant", [case.op("linear", [x, case.weight(16, 16), ""], zero=7), case.multiplier(16, 16)], **CODES
    )
    acc = case.op("linear", [q, case.weight(8, 16), ""], zero=7)
    yield case, case.program(q, acc, q, x)


def elementwise() -> Iterator[tuple[Case, Program]]:
    for n in (1, 15, 16, 17, 63, 65, 1000):
        case = Case(f"codes and floats n={n}")
        x = case.floats(n, scale=50)
        case.inputs[x][: min(n, 4)] = np.array([np.nan, np.inf, -np.inf, -0.0], F32)[: min(n, 4)]
        q = case.op("quantize", [x], scale=0.37, zero=101, lo=3, hi=240)
        lut = case.constant(case.rng.standard_normal(256).astype(F32))
        table = case.constant(case.rng.integers(0, 256, 256, dtype=np.uint8))
        yield (
            case,
            case.program(
                q,
                case.op("dequantize", [q], scale=0.2, zero=17),
                case.op("table", [q, table]),
                case.op("table", [q, lut]),
            ),
        )
    add = {
        "a_zero": 3,
        "a_multiplier": 0.7,
        "b_zero": 250,
        "b_multiplier": 1.3,
        "zero": 120,
        "lo": 0,
        "hi": 255,
    }
    mul = {"a_zero": 3, "b_zero": 250, "multiplier": 0.01, "zero": 120, "lo": 5, "hi": 250}
    for a, b in (
        ((3, 70), (3, 70)),
        ((2, 5, 5, 17), (2, 1, 1, 17)),
        ((4, 33), (1, 1)),
        ((4, 1), (4, 19)),
        ((1,), (40,)),
    ):
        case = Case(f"sums and products of codes {a} {b}")
        x, y = case.codes(*a), case.codes(*b)
        yield (
            case,
            case.program(
                case.op("add_q", [x, y], **add),
                case.op("mul_q", [x, y], **mul),
                case.op("add_q", [y, x], **add),
            ),
        )
    for channels in (1, 16, 33):
        case = Case(f"affine channels={channels}")
        m, b = (case.constant((case.rng.standard_normal(channels) * s).astype(F32)) for s in (1, 30))
        yield case, case.program(case.op("affine_q", [case.codes(3, 4, channels), m, b], in_zero=11, **CODES))
    for shape in ((5, 37), (1, 16), (3, 2, 100), (4, 1)):
        case = Case(f"dynamic ranges {shape}")
        x = case.floats(*shape)
        zero = case.input(np.zeros(shape, F32))
        positive = case.input(np.abs(case.inputs[x]) + 1)
        outputs = [
            o
            for v in (x, zero, positive)
            for token in (True, False)
            for o in case.op("dynamic_quantize", [v], 3, per_token=token)
        ]
        yield case, case.program(*outputs)


EXACT = (
    linears,
    grouped,
    signs,
    bits,
    wide,
    convs,
    packings,
    dynamic_convs,
    chains,
    elementwise,
    pools,
    attentions,
    normalisations,
    recurrents,
    movements,
    sums,
    shifts,
    levels,
)

__all__ = ["EXACT", "Case", "inexact"]

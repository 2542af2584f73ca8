"""Small programs of pools, attention, norms, recurrent layers and what moves values about; and the inexact ones."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from cases import CODES, F32, Case

from pennyweight.program.ir import Program


def pools() -> Iterator[tuple[Case, Program]]:
    for shape, kernel, stride, pads in (
        ((1, 7, 8, 3), [3, 3], [2, 2], [1, 1, 1, 1]), ((2, 5, 5, 64), [2, 2], [2, 2], [0] * 4),
        ((1, 6, 7, 70), [3, 2], [1, 2], [1, 0, 1, 1]), ((1, 9, 17), [3], [2], [1, 0]), ((1, 4, 4, 4, 5), [2, 2, 2], [2, 2, 2], [0] * 6),
    ):  # fmt: skip
        case = Case(f"pools {shape} {kernel}")
        x, f = case.codes(*shape), case.floats(*shape)
        attrs = {"kernel": kernel, "stride": stride, "pads": pads}
        sums = case.op("sum_pool", [x], zero=9, **attrs)
        mean = case.op("requant", [case.op("sum_pool", [x], zero=9, **attrs), case.multiplier(1, 1)], **CODES)
        one = [1] * len(kernel)
        yield (
            case,
            case.program(
                case.op("max_pool", [x], dilation=one, **attrs),
                case.op("max_pool", [f], dilation=one, **attrs),
                sums,
                mean,
            ),
        )
    for shape, axes, keep in (
        ((2, 6, 5, 33), [1, 2], False),
        ((2, 6, 5, 33), [1, 2], True),
        ((3, 4, 5), [2], False),
        ((2, 3, 4), [0, 2], True),
    ):
        case = Case(f"sums of codes {shape} {axes} {keep}")
        acc = case.op("sum_q", [case.codes(*shape)], zero=100, axes=axes, keepdims=keep)
        q = case.op("requant", [acc, case.constant(np.array([0.01], F32))], **CODES)
        alone = case.op("sum_q", [list(case.inputs)[0]], zero=50, axes=axes, keepdims=keep)
        yield case, case.program(q, alone)


def attentions() -> Iterator[tuple[Case, Program]]:
    for lead, t, s, d, e, mask, causal in (
        ((2, 3), 7, 7, 8, 8, None, False), ((1, 2), 33, 17, 32, 20, (1, 1, 1, 17), False), ((3,), 5, 130, 16, 64, (5, 130), False),
        ((1, 1), 20, 20, 5, 3, None, True), ((), 100, 100, 32, 32, (100, 1), True), ((2, 2), 1, 9, 64, 16, (2, 1, 1, 9), False),
    ):  # fmt: skip
        case = Case(f"attention {lead} {t} {s} {d} {e} {mask} {causal}")
        q, k, v = case.codes(*lead, t, d), case.codes(*lead, s, d), case.codes(*lead, s, e)
        operands = [q, k, v]
        if mask is not None:
            values = np.where(
                case.rng.random(mask) < 0.2, F32(-1e9), case.rng.standard_normal(mask).astype(F32)
            )
            operands.append(case.input(values.astype(F32)))
        attrs = {"q_zero": 120, "k_zero": 131, "v_zero": 128, "factor": float(F32(0.004)), "causal": causal}
        acc = case.op("attention", operands, **attrs)
        out = case.op("requant", [acc, case.multiplier(1, 40)], **CODES)
        other = case.op("attention", operands, **attrs)
        yield case, case.program(out, case.op("rescale", [other, case.multiplier(e, 40)]))
    for a, b, transposed in (
        ((5, 9), (9, 4), False),
        ((2, 3, 17, 40), (2, 3, 33, 40), True),
        ((3, 20, 7), (7, 18), False),
        ((2, 1, 4, 64), (5, 64, 3), False),
    ):
        case = Case(f"matmul {a} {b} {transposed}")
        acc = case.op(
            "matmul", [case.codes(*a), case.codes(*b)], a_zero=10, b_zero=200, transpose_b=transposed
        )
        yield case, case.program(case.op("rescale", [acc, case.constant(np.array([0.001], F32))]))


def normalisations() -> Iterator[tuple[Case, Program]]:
    for rows, n in ((1, 1), (3, 15), (5, 16), (4, 17), (2, 200), (6, 384)):
        case = Case(f"normalise {rows} {n}")
        x = case.floats(rows, n)
        gain, shift = (case.constant(case.rng.standard_normal(n).astype(F32)) for _ in range(2))
        y = case.op("layer_norm", [x, gain, shift], eps=1e-5)
        yield (
            case,
            case.program(
                case.op("softmax", [x]),
                y,
                case.op("layer_norm", [x, "", ""], eps=1e-12),
                case.op("quantize", [y], scale=0.05, **CODES),
                case.op("rms_norm", [x, gain], eps=1e-5),
                case.op("rms_norm", [x, ""], eps=0.0),
            ),
        )
        ranged = Case(f"RMS norm rounded row by row {rows} {n}")
        normed = ranged.op("rms_norm", [ranged.floats(rows, n), ""], eps=1e-6)
        parts = ranged.op("dynamic_quantize", [normed], results=3, per_token=True)
        yield ranged, ranged.program(*parts)
        for rounded in (False, True):  # a gate whose other factor is made before it, and one behind
            case = Case(f"gates {rows} {n} {rounded}")
            x, none = case.floats(rows, n), {"p": 0.0, "q": 0.0}
            before = case.op("unary", [x], fn="square", **none)
            y = case.op("binary", [before, case.op("unary", [x], fn="silu", **none)], fn="mul")
            gate = case.op("unary", [y], fn="sigmoid", **none)
            y = case.op("binary", [gate, case.op("unary", [y], fn="neg", **none)], fn="mul")
            own = case.op("unary", [x], fn="tanh", **none)
            parts = case.op("dynamic_quantize", [y], results=3, per_token=True) if rounded else [y]
            yield case, case.program(*parts, case.op("binary", [own, own], fn="mul"))
    for lead, turns, n in (
        ((1,), (1,), 2),
        ((2, 5, 3), (5, 1), 34),
        ((1, 7, 2), (7, 1), 128),
        ((4, 9), (4, 9), 66),
    ):
        case = Case(f"rotary {lead} {turns} {n}")
        cos, sin = case.floats(*turns, n), case.floats(*turns, n)
        whole = case.op("rotary", [case.floats(*lead, n), cos, sin])
        wide = case.floats(*lead, 2 * n)
        axes = len(lead) + 1
        part = case.op("slice", [wide], starts=[0] * len(lead) + [n], stops=[*lead, 2 * n], steps=[1] * axes)
        yield case, case.program(whole, case.op("rotary", [part, cos, sin]))
    for lead, n, size in (((1,), 1, 1), ((3,), 8, 2), ((2, 3), 12, 4), ((5,), 24, 8), ((2, 2), 48, 16), ((3,), 96, 32),
                          ((7, 5), 1536, 512), ((2,), 4096, 4096), ((4,), 172, 4)):  # fmt: skip
        case = Case(f"hadamard {lead} {n} {size}")
        whole = case.op("hadamard", [case.floats(*lead, n)], size=size)
        wide, axes = case.floats(*lead, 2 * n), len(lead) + 1
        part = case.op("slice", [wide], starts=[0] * len(lead) + [n], stops=[*lead, 2 * n], steps=[1] * axes)
        yield case, case.program(whole, case.op("hadamard", [part], size=size))
    case = Case("float functions")
    x = case.floats(3, 77, scale=6)
    from pennyweight.program.ops.functions import UNARY

    params = {
        "clip": (-1.5, 2.5),
        "mul": (1.7, 0.0),
        "leaky_relu": (0.1, 0.0),
        "elu": (0.7, 0.0),
        "div": (3.0, 0.0),
    }
    outputs = [
        case.op("unary", [x], fn=fn, p=params.get(fn, (0.5, 0))[0], q=params.get(fn, (0, 0.0))[1])
        for fn, (_, exact) in UNARY.items()
        if exact
    ]
    yield case, case.program(*outputs)


def recurrents() -> Iterator[tuple[Case, Program]]:
    for kind, gates, (t, n, i, h), reverse, bias in (
        ("lstm", 4, (5, 3, 7, 9), False, True), ("lstm", 4, (200, 1, 24, 33), False, True), ("lstm", 4, (4, 17, 64, 16), True, False),
        ("gru", 3, (6, 2, 10, 20), False, True), ("gru", 3, (3, 5, 65, 17), True, False), ("gru", 3, (1, 1, 1, 1), False, True),
        # large enough for several threads: few rows, many, and as many as one product of inputs takes
        ("lstm", 4, (6, 1, 20, 370), False, True), ("lstm", 4, (3, 16, 33, 185), True, True),
        ("gru", 3, (3, 130, 24, 121), False, True), ("gru", 3, (4, 2, 5, 450), True, False),
    ):  # fmt: skip
        case = Case(f"{kind} {t} {n} {i} {h} {reverse} {bias}")
        states = [case.floats(n, h, scale=0.5) for _ in range(2 if kind == "lstm" else 1)]
        operands = [
            case.floats(t, n, i, scale=1),
            *states,
            case.weight(gates * h, i),
            case.constant((case.rng.uniform(0.5, 2, gates * h) / (100 * np.sqrt(i))).astype(F32)),
        ]
        operands += [case.weight(gates * h, h), case.constant(np.array([0.005], F32))]
        operands += [
            case.constant((case.rng.standard_normal(gates * h) * 0.2).astype(F32)) if bias else ""
            for _ in range(2)
        ]
        yield case, case.program(*case.op(kind, operands, 1 + len(states), reverse=reverse))


def movements() -> Iterator[tuple[Case, Program]]:
    case = Case("movement of every dtype")
    outputs = []
    for x in (
        case.codes(2, 3, 4),
        case.floats(2, 3, 4),
        case.input(case.rng.integers(-9, 9, (2, 3, 4))),
        case.input(case.rng.random((2, 3, 4)) < 0.5),
    ):
        outputs.append(case.op("transpose", [x], perm=[2, 0, 1]))
        outputs.append(case.op("slice", [x], starts=[0, 1, 0], stops=[2, 3, 4], steps=[1, 1, 2]))
        outputs.append(
            case.op(
                "expand",
                [case.op("slice", [x], starts=[0, 0, 0], stops=[2, 1, 4], steps=[1, 1, 1])],
                shape=[3, 2, 5, 4],
            )
        )
        outputs.append(case.op("concat", [x, x], axis=1))
        outputs.append(case.op("upsample", [x], repeats=[1, 3, 2]))
        outputs.append(case.op("pad", [x], pads=[0, 1, 2, 1, 0, 0], value=1))
        index = case.constant(np.array([[0, -1], [2, 1]]))
        outputs.append(case.op("gather", [x, index], axis=1))
        outputs.append(
            case.op(
                "gather_nd", [x, case.constant(np.array([[1], [0]])), case.constant(np.array([2, -3, 0]))]
            )
        )
        outputs.append(case.op("reshape", [x], shape=[4, 6]))
    yield case, case.program(*outputs)
    case = Case("integers and masks")
    x, y = case.input(case.rng.integers(-9, 9, (3, 4))), case.input(case.rng.integers(1, 9, (1, 4)))
    outputs = [
        case.op("binary", [x, y], fn=fn)
        for fn in ("add", "sub", "mul", "min", "max", "floordiv", "mod", "eq", "ne", "lt", "le", "gt", "ge")
    ]
    f, g = case.floats(3, 4), case.floats(3, 1)
    outputs += [
        case.op("binary", [f, g], fn=fn)
        for fn in ("add", "sub", "mul", "div", "min", "max", "eq", "lt", "ge")
    ]
    b = outputs[7]
    outputs += [case.op("binary", [b, outputs[9]], fn=fn) for fn in ("and", "or", "xor")]
    outputs += [
        case.op("where", [b, f, g]),
        case.op("cast", [f], dtype="i64"),
        case.op("cast", [x], dtype="f32"),
        case.op("cast", [b], dtype="f32"),
        case.op("cast", [x], dtype="bool"),
    ]
    outputs += [
        case.op("iota", [], size=7, step=-2, start=5),
        case.op("full", [], shape=[2, 3], value=1.5, dtype="f32"),
        case.op("argmax", [f], axis=1, keepdims=False),
    ]
    outputs += [
        case.op("reduce", [x], fn=fn, axes=[0], keepdims=True) for fn in ("sum", "max", "min", "prod")
    ]
    yield case, case.program(*outputs)
    case = Case("embedding")
    ids = case.input(case.rng.integers(-11, 11, (3, 5)))
    codes, scale = case.weight(11, 24), case.constant(case.rng.uniform(0.1, 1, (11, 3)).astype(F32))
    packed = case.constant(case.rng.integers(0, 256, (11, 13), dtype=np.uint8), "u4")
    one, zero = (case.constant(case.rng.standard_normal((1, 5)).astype(F32)) for _ in range(2))
    yield case, case.program(
        case.op("embedding", [ids, codes, scale], bits=8, n=24), case.op("embedding", [ids, packed, one, zero], bits=4, n=25),
        case.op("decode", [packed, one, zero], bits=4, shape=[11, 5, 5]),
    )  # fmt: skip


def sums() -> Iterator[tuple[Case, Program]]:
    """Sums, means and products over float axes: last ones, middle ones, several apart, of one element and of none."""
    pool = {"kernel": [3, 2], "stride": [2, 1], "pads": [1, 0, 1, 1]}
    for shape in ((2, 7, 6, 8), (3, 1, 33, 1), (1, 40, 5, 130), (2, 3, 1, 1), (2, 0, 3, 4)):
        case = Case(f"float sums {shape}")
        x = case.floats(*shape)
        outputs = []
        if all(shape):
            outputs = [case.op("avg_pool", [x], count_pads=flag, **pool) for flag in (True, False)]
        axes = ([3], [2], [0], [1, 2], [2, 3], [1, 2, 3], [0, 1, 2, 3], [0, 2], [3, 1], [0, 1, 3])
        outputs += [
            case.op("reduce", [x], fn=fn, axes=ax, keepdims=len(ax) == 2)
            for fn in ("sum", "mean", "prod", "max", "min")
            for ax in axes
            if all(shape) or fn in ("sum", "prod")
        ]
        yield case, case.program(*outputs)


def inexact() -> Iterator[tuple[Case, Program]]:
    """Float products: sums in another order."""
    for m, n, k in ((1, 1, 1), (5, 17, 33), (13, 48, 100), (30, 7, 64)):
        case = Case(f"float products {m} {n} {k}")
        x = case.floats(m, k, scale=1)
        w, bias = (
            case.constant(case.rng.standard_normal((n, k)).astype(F32)),
            case.constant(case.rng.standard_normal(n).astype(F32)),
        )
        half = case.constant(case.rng.standard_normal((n, k)).astype(np.float16), "f16")
        brain = case.constant(
            (case.rng.standard_normal((n, k)).astype(F32).view(np.uint32) >> 16).astype(np.uint16), "bf16"
        )
        outputs = [case.op("linear_f32", [x, v, bias]) for v in (w, half, brain)]
        outputs.append(case.op("matmul_f32", [x, case.floats(k, n, scale=1)], transpose_b=False))
        outputs.append(
            case.op(
                "matmul_f32", [case.floats(2, m, k, scale=1), case.floats(1, n, k, scale=1)], transpose_b=True
            )
        )
        scale = case.constant((case.rng.uniform(0.5, 2, (n, 1)) / 100).astype(F32))
        outputs.append(case.op("linear_w", [x, case.weight(n, k), scale, "", bias], bits=8, n=k))
        if k % 4 == 0:
            scales = case.constant((case.rng.uniform(0.5, 2, (n, k // 4)) / 10).astype(F32))
            zeros = case.constant(case.rng.standard_normal((n, k // 4)).astype(F32))
            packed = case.constant(case.rng.integers(0, 256, (n, k // 2), dtype=np.uint8), "u4")
            outputs.append(case.op("linear_w", [x, packed, scales, zeros], bits=4, n=k))
        yield case, case.program(*outputs)
    case = Case("float convolutions")
    x = case.floats(2, 7, 6, 8, scale=1)
    attrs = {"stride": [1, 2], "pads": [1, 1, 1, 0], "dilation": [1, 1], "groups": 1}
    w = case.constant(case.rng.standard_normal((10, 8, 3, 3)).astype(F32))
    a = case.op("conv_f32", [x, w, case.constant(case.rng.standard_normal(10).astype(F32))], **attrs)
    grouped = case.constant(case.rng.standard_normal((8, 4, 3, 3)).astype(F32))
    b = case.op("conv_f32", [x, grouped], **{**attrs, "groups": 2})
    scale = case.constant((case.rng.uniform(0.5, 2, (8, 1)) / 100).astype(F32))
    stored = case.op("decode", [case.weight(8, 9), scale], bits=8, shape=[8, 1, 3, 3])
    c = case.op("conv_f32", [x, stored], **{**attrs, "groups": 8})
    others = [
        case.op("unary", [case.op("unary", [x], fn="abs", p=0.0, q=0.0)], fn=fn, p=1.7, q=0.0)
        for fn in ("softplus", "mish", "log", "sin", "cos", "pow")
    ]
    yield case, case.program(a, b, c, *others)

"""Small programs that reach every op and every kernel, at ragged sizes and extreme values."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from pennyweight.program.ir import Constant, Op, Program, TensorType

F32 = np.float32
NAMES = {"float32": "f32", "uint8": "u8", "int8": "i8", "int32": "i32", "int64": "i64", "bool": "bool"}
CODES = {"zero": 7, "lo": 0, "hi": 255}


@dataclass
class Case:
    """A program being written, with values for its inputs."""

    name: str
    seed: int = 0
    ops: list[Op] = field(default_factory=list)
    inputs: dict[str, np.ndarray] = field(default_factory=dict)
    constants: dict[str, Constant] = field(default_factory=dict)
    outputs: list[str] = field(default_factory=list)

    def __post_init__(self):
        self.rng = np.random.default_rng([self.seed, *self.name.encode()])

    def input(self, array):
        name = f"x{len(self.inputs)}"
        self.inputs[name] = np.ascontiguousarray(array)
        return name

    def codes(self, *shape, extreme=False):
        if extreme:
            return self.input(self.rng.choice(np.array([0, 255], np.uint8), shape))
        return self.input(self.rng.integers(0, 256, shape, dtype=np.uint8))

    def floats(self, *shape, scale=3.0):
        return self.input((self.rng.standard_normal(shape) * scale).astype(F32))

    def constant(self, array, dtype=""):
        name = f"c{len(self.constants)}"
        array = np.ascontiguousarray(array)
        self.constants[name] = Constant(dtype or NAMES[str(array.dtype)], array)
        return name

    def weight(self, *shape, extreme=False):
        if extreme:
            return self.constant(self.rng.choice(np.array([-128, 127], np.int8), shape))
        return self.constant(self.rng.integers(-128, 128, shape, dtype=np.int8))

    def multiplier(self, n, k):
        """Multipliers that spread accumulators of depth k over the codes."""
        return self.constant((self.rng.uniform(0.2, 3.0, n) / (70.0 * 70.0 * np.sqrt(k))).astype(F32))

    def bias(self, n):
        return self.constant(self.rng.integers(-20000, 20000, n, dtype=np.int32))

    def op(self, kind, inputs, results=1, **attrs):
        outputs = tuple(f"v{len(self.ops)}_{i}" for i in range(results))
        self.ops.append(Op(kind, tuple(inputs), outputs, attrs, f"{kind}{len(self.ops)}"))
        return outputs[0] if results == 1 else outputs

    def program(self, *outputs):
        self.outputs = list(outputs)
        types = {n: TensorType(NAMES[str(a.dtype)], tuple(a.shape)) for n, a in self.inputs.items()}
        return Program(types, self.outputs, self.ops, self.constants, {}, list(range(len(outputs))))


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
    if tail == "clamped":
        return case.op("requant", [acc, case.multiplier(n, k)], zero=128, lo=100, hi=180)
    return q


def linears() -> Iterator[tuple[Case, Program]]:
    sizes = [
        (1, 1, 1),
        (1, 16, 64),
        (2, 17, 3),
        (3, 64, 65),
        (5, 130, 4),
        (7, 48, 31),
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
    for zero in (0, 255):
        yield linear_case(19, 66, 100, zero=zero, bias=False)
    yield linear_case(9, 40, 1000, extreme=True)
    yield linear_case(40, 64, 2048, extreme=True, zero=0, tail="acc")
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
    yield conv_case((1, 9, 13, 33), 33, (3, 3), dilation=2, pads=2, groups=33)
    yield conv_case((1, 7, 30), 30, (3,), pads=1, groups=30)
    yield conv_case((1, 6, 9, 70), 70, (3, 3), pads=1, groups=70, extreme=True, zero=255)


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
            ),
        )
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
    pool = {"kernel": [3, 2], "stride": [2, 1], "pads": [1, 0, 1, 1]}
    pooled = [case.op("avg_pool", [x], count_pads=flag, **pool) for flag in (True, False)]
    sums = [
        case.op("reduce", [x], fn=fn, axes=axes, keepdims=False)
        for fn in ("sum", "mean", "max")
        for axes in ([1, 2], [3], [0, 2])
    ]
    others = [
        case.op("unary", [case.op("unary", [x], fn="abs", p=0.0, q=0.0)], fn=fn, p=1.7, q=0.0)
        for fn in ("softplus", "mish", "log", "sin", "cos", "pow")
    ]
    yield case, case.program(a, b, c, *pooled, *sums, *others)


EXACT = (
    linears,
    convs,
    dynamic_convs,
    chains,
    elementwise,
    pools,
    attentions,
    normalisations,
    recurrents,
    movements,
)

"""What several folders of tests share: a program with every op, and tiny networks."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # workers that each run threads on all cores wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest

from pennyweight.program.ir import Constant, Op, Program, TensorType


class Builder:
    """Puts a program together op by op."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(0)
        self.ops: list[Op] = []
        self.constants: dict[str, Constant] = {}

    def f32(self, *shape) -> str:
        return self.store("f32", (self.rng.random(shape) + 0.1).astype(np.float32))

    def i8(self, *shape) -> str:
        return self.store("i8", self.rng.integers(-127, 128, shape).astype(np.int8))

    def i32(self, *shape) -> str:
        return self.store("i32", self.rng.integers(-1000, 1000, shape).astype(np.int32))

    def u8(self, *shape) -> str:
        return self.store("u8", self.rng.integers(0, 256, shape).astype(np.uint8))

    def u4(self, *shape) -> str:
        return self.store("u4", self.rng.integers(0, 256, shape).astype(np.uint8))

    def index(self, values) -> str:
        return self.store("i64", np.asarray(values, np.int64))

    def store(self, dtype, data) -> str:
        name = f"c{len(self.constants)}.{dtype}"
        self.constants[name] = Constant(dtype, np.asarray(data))
        return name

    def op(self, kind, *inputs, results=1, **attrs):
        outputs = tuple(f"v{len(self.ops)}.{i}" for i in range(results))
        self.ops.append(Op(kind, tuple(inputs), outputs, attrs, f"site.{kind}"))
        return outputs[0] if results == 1 else outputs


CODES = {"zero": 3, "lo": 0, "hi": 255}


def broad_program() -> Program:
    """A small program with every op there is, and every kind of constant."""
    b = Builder()
    x, ids = "x", "ids"  # f32 [batch, 3, 4, 4], i64 [length]
    window = {"stride": [1, 1], "pads": [1, 1, 1, 1], "dilation": [1, 1]}
    pool = {"kernel": [2, 2], "stride": [2, 2], "pads": [0, 0, 0, 0]}
    ends = []
    last = b.op("transpose", x, perm=[0, 2, 3, 1])
    q = b.op("quantize", last, scale=0.02, zero=7, lo=0, hi=255)
    ends.append(b.op("dequantize", q, scale=0.02, zero=7))
    bits = b.op("sign", q, b.u8(1), groups=1)
    acc = b.op("conv_binary", bits, b.u8(3, 4), b.i32(3), shape=[3, 3, 3, 3], groups=1, **window)
    flat = b.op("reshape", b.op("sign", acc, b.i32(3), groups=1), shape=["batch", 16])
    ends.append(b.op("linear_binary", flat, b.u8(2, 16), n=128))
    acc = b.op("conv", q, b.i8(4, 3, 3, 3), b.i32(4), zero=7, groups=1, **window)
    r = b.op("requant", acc, b.f32(4), **CODES)
    s = b.op("requant_add", acc, b.f32(1), r, r_zero=3, r_multiplier=0.5, **CODES)
    s = b.op("requant_add_shift", acc, s, shift=9, r_zero=3, r_shift=-1, **CODES)
    ends.append(b.op("requant_shift", acc, shift=10, **CODES))
    t = b.op("table", s, b.u8(256))
    s = b.op("add_q", r, t, a_zero=3, a_multiplier=0.5, b_zero=3, b_multiplier=0.25, **CODES)
    s = b.op("mul_q", s, t, a_zero=3, b_zero=3, multiplier=0.01, **CODES)
    s = b.op("affine_q", s, b.f32(4), b.f32(4), in_zero=3, **CODES)
    m = b.op("max_pool", s, dilation=[1, 1], **pool)
    pooled = b.op("sum_pool", m, zero=3, kernel=[2, 2], stride=[1, 1], pads=[0, 0, 0, 0])
    ends.append(b.op("rescale", pooled, b.f32(1)))
    summed = b.op("sum_q", s, zero=3, axes=[1, 2], keepdims=False)
    p = b.op("rescale", summed, b.f32(4), b.f32(4))  # f32 [batch, 4]
    qp = b.op("quantize", p, scale=0.5, zero=0, lo=0, hi=200)
    ends.append(b.op("rescale", b.op("linear", qp, b.i8(6, 4), b.i32(6), zero=0), b.f32(6)))
    codes, row, zero = b.op("dynamic_quantize", p, results=3, per_token=True)
    ends.append(b.op("rescale", b.op("linear", codes, b.i8(6, 4), "", zero, zero=0), b.f32(6), "", row))
    wide = b.store("i16", (np.arange(24) * 700 - 8000).astype(np.int16).reshape(6, 4))
    ends.append(b.op("linear", codes, wide, "", zero, zero=0))
    ternary = b.op("unpack", b.u8(6, 1), b.i8(4), bits=2, shape=[6, 4])
    ends.append(b.op("linear", codes, ternary, "", zero, zero=0))
    grouped = b.op("linear_grouped", codes, b.u4(6, 2), b.f32(6, 2), zero, row, b.f32(6), bits=4, n=4)
    ends.append(grouped)
    halves = b.store("f16", np.full((6, 2), 0.5, np.float16))
    ends.append(b.op("linear_grouped", codes, b.i8(6, 4), halves, zero, row, bits=8, n=4))
    h = b.op("linear_w", p, b.u4(5, 2), b.f32(5, 2), "", b.f32(5), bits=4, n=4)
    h = b.op("unary", h, fn="clip", p=0.0, q=float("inf"))  # f32 [batch, 5]
    low = b.store("f32", np.array(-np.inf, np.float32))
    flag = b.store("bool", np.array([True, False, True, True, False]))
    ends.append(b.op("where", flag, h, low))
    half = (np.float32([[1.5, 2, -1, 0.5, 3]]).view(np.uint32) >> 16).astype(np.uint16)
    ends.append(b.op("linear_f32", h, b.store("bf16", half)))
    ends.append(b.op("cast", b.store("f16", np.float16([1, 2])), dtype="f32"))
    tokens = b.op("embedding", ids, b.i8(6, 5), b.f32(6, 1), bits=8, n=5)  # f32 [length, 5]
    ends.append(b.op("reshape", tokens, shape=["(length * 5)"]))
    ends.append(b.op("gather", b.f32(6, 2), ids, axis=0))
    ends.append(b.op("gather", b.f32(6, 2), b.index([1, -1]), axis=0))
    ends.append(b.op("gather_nd", b.f32(6, 6, 2), ids, ids))
    n = b.op("layer_norm", tokens, b.f32(5), b.f32(5), eps=1e-5)
    n = b.op("rms_norm", n, b.f32(5), eps=1e-5)
    turned = b.op("rotary", b.f32(3, 2, 6), b.f32(3, 1, 6), b.f32(1, 6))
    ends.append(b.op("hadamard", turned, size=2))
    n = b.op("softmax", n)
    ends.append(b.op("argmax", n, axis=1, keepdims=False))
    ends.append(b.op("reduce", n, fn="mean", axes=[0], keepdims=True))
    ends.append(b.op("binary", n, b.f32(5), fn="mul"))
    ends.append(b.op("matmul_f32", n, b.f32(5, 2), transpose_b=False))
    qn = b.op("quantize", n, scale=0.004, zero=0, lo=0, hi=255)
    ends.append(b.op("matmul", qn, qn, a_zero=0, b_zero=0, transpose_b=True))
    ends.append(b.op("attention", qn, qn, qn, q_zero=0, k_zero=0, v_zero=0, factor=0.001, causal=True))
    spoken = b.op("reshape", n, shape=[1, "length", 1, 5])
    kept, count = b.store("f32", np.ones((2, 1, 1, 2, 5), np.float32)), b.index([1])
    ends.append(b.op("past_attention", spoken, spoken, spoken, kept, count, block=0, factor=0.5))
    parts = b.op("dynamic_quantize", spoken, results=3, per_token=True)
    codes_kept, spans = b.u8(2, 1, 1, 2, 5), b.store("f32", np.ones((2, 1, 1, 2, 2), np.float32))
    ends.append(
        b.op("past_attention_q", spoken, *parts, *parts, codes_kept, spans, count, block=0, factor=0.5)
    )
    ends.append(b.op("slice", x, starts=[0, 1, 0, 0], stops=["batch", 3, 4, 4], steps=[1, 1, 2, 2]))
    ends.append(b.op("concat", x, x, axis=1))
    ends.append(b.op("pad", q, pads=[0, 1, 1, 0, 0, 1, 1, 0], value=7))
    ends.append(b.op("expand", b.f32(1, 5), shape=["length", 5]))
    ends.append(b.op("upsample", x, repeats=[1, 1, 2, 2]))
    ends.append(b.op("stuff", q, factors=[1, 2, 2, 1], value=7))
    ends.append(b.op("avg_pool", last, count_pads=False, **pool))
    ends.append(b.op("conv_f32", last, b.f32(4, 3, 3, 3), b.f32(4), groups=1, **window))
    ends.append(b.op("decode", b.i8(4, 6), b.f32(4, 1), b.f32(4, 1), bits=8, shape=[4, 2, 3]))
    ends.append(b.op("decode_levels", b.u4(4, 3), b.f32(16), b.f32(4, 2), bits=4, shape=[4, 2, 3]))
    ends.append(b.op("iota", size="length", step=2, start=1))
    ends.append(b.op("full", shape=["batch", 2], value=1.5, dtype="f32"))
    series = b.op("reshape", tokens, shape=["length", 1, 5])
    state = b.f32(1, 2)
    ends += b.op("lstm", series, state, state, b.i8(8, 5), b.f32(8), b.i8(8, 2), b.f32(8), b.f32(8), b.f32(8),
                 results=3, reverse=False)  # fmt: skip
    ends += b.op("gru", series, state, b.i8(6, 5), b.f32(6), b.i8(6, 2), b.f32(1), results=2, reverse=True)
    inputs = {"x": TensorType("f32", ("batch", 3, 4, 4)), "ids": TensorType("i64", ("length",))}
    meta = {"journal": [["site", "stem:weight", {"spec": "int8n[1,*]"}]], "model": "test"}
    tree = {"first": 0, "rest": [*range(1, len(ends)), None]}
    return Program(inputs, ends, b.ops, b.constants, {"batch": 2, "length": 3}, tree, meta)


@pytest.fixture(scope="session")
def zoo() -> Program:
    """A program with every op there is."""
    return broad_program()


@pytest.fixture
def zoo_inputs() -> dict:
    """Inputs of the zoo for other sizes than its example's."""
    rng = np.random.default_rng(5)
    return {"x": rng.standard_normal((3, 3, 4, 4), dtype=np.float32), "ids": rng.integers(0, 6, 4)}


def tiny_cnn():
    """A residual CNN of 28 k multiply-adds with batch norm, the shape of what people bring."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    class Tiny(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
            self.norm = nn.BatchNorm2d(8)
            self.depth = nn.Conv2d(8, 8, 3, padding=1, groups=8)
            self.head = nn.Linear(8, 5)

        def forward(self, x):
            x = F.relu(self.norm(self.stem(x)))
            x = F.relu6(x + self.depth(x))
            return self.head(F.adaptive_avg_pool2d(F.max_pool2d(x, 2), 1).flatten(1))

    torch.manual_seed(0)
    model = Tiny()
    with torch.no_grad():
        model.norm.running_mean.normal_()
        model.norm.running_var.uniform_(0.5, 2)
    return model.eval()


@pytest.fixture
def cnn():
    """An untrained tiny CNN; see `tiny_cnn`."""
    return tiny_cnn()


@pytest.fixture
def pictures():
    """Four batches of two inputs for it."""
    import torch

    return list(torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1)).split(2))

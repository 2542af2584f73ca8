"""Products of signs against float32 in PyTorch and against our int8, in turns, on the same machine.

usage: python benchmarks/binary.py [--only product conv network] [--isa avx512vnni] [--threads 2] [--seconds 1.0]

product   [1024, 1024] times [1024, 1024]: bits to bits, to codes and to floats; from floats, packing included; beside
          int8, and float32 of this engine and of PyTorch; the peak is of the counting instructions on registers alone
conv      3 x 3, 256 -> 256 at 14 x 14 and 128 -> 128 at 28 x 28, float in and out, packing or rounding included
network   a residual network of the shape of ResNet-20 (32 x 32, widths 16, 32, 64), a shortcut by every convolution:
          first and last layer int8 and signs between, all int8, eager float

Ratios are medians over paired blocks (`pennyweight.measure`). int8 runs on the strongest instruction set there is (AMX
tiles where the processor has them); --isa forces one for ours, to compare like with like.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import pennyweight as pw
from pennyweight.measure import interleaved
from pennyweight.program.ir import Constant, Op, Program, TensorType
from pennyweight.recipe import Recipe
from pennyweight.runtime.engine import Engine
from pennyweight.runtime.library import default_isa
from pennyweight.runtime.peaks import macs_per_second

Calls = dict[str, Callable[[], Any]]
RNG = np.random.default_rng(0)
INT8 = """
[[rules]]
weight = "int8n[1,*]"
input = "uint8[*]+z"
optional = true

[[passes]]
pass = "fold_batch_norm"

[[passes]]
pass = "calibrate"

[[passes]]
pass = "solve"
"""


def recipe(*layers: str) -> Recipe:
    """Signs in these layers, int8 in the rest."""
    rule = '[[rules]]\nmatch = "{}"\ntypes = ["Conv2d"]\nweight = "binary[1,*]"\ninput = "binary[*]"\n'
    return Recipe.parse("\n".join(rule.format(name) for name in layers) + INT8)


def program(ops: list[Op], kind: TensorType, constants: dict[str, Constant]) -> Program:
    """A program of one input x and one result y."""
    return Program({"x": kind}, ["y"], ops, constants, {}, 0)


def bits(*shape: int) -> np.ndarray[Any, Any]:
    """Random bytes."""
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def product(n: int, tail: str, packed: bool) -> Program:
    """`n` rows of n signs times n columns."""
    constants = {"w": Constant("u8", bits(n, n // 8)), "t": Constant("f32", np.zeros(1, np.float32))}
    ops = [] if packed else [Op("sign", ("x", "t"), ("b",), {"groups": 1})]
    ops.append(Op("linear_binary", ("x" if packed else "b", "w"), ("acc",), {"n": n}))
    if tail == "bits":
        constants["c"] = Constant("i32", np.zeros(n, np.int32))
        ops.append(Op("sign", ("acc", "c"), ("y",), {"groups": 1}))
    else:
        constants["m"] = Constant("f32", np.full(n, 0.5, np.float32))
        kind, attrs = ("requant", {"zero": 128, "lo": 0, "hi": 255}) if tail == "codes" else ("rescale", {})
        ops.append(Op(kind, ("acc", "m"), ("y",), attrs))
    return program(ops, TensorType("u8", (n, n // 8)) if packed else TensorType("f32", (n, n)), constants)


def product_int8(n: int) -> Program:
    """The same on codes, to codes."""
    w = RNG.integers(-127, 128, (n, n), dtype=np.int8)
    constants = {"w": Constant("i8", w), "m": Constant("f32", np.full(n, 1e-4, np.float32))}
    ops = [Op("linear", ("x", "w"), ("acc",), {"zero": 128}),
           Op("requant", ("acc", "m"), ("y",), {"zero": 128, "lo": 0, "hi": 255})]  # fmt: skip
    return program(ops, TensorType("u8", (n, n)), constants)


def product_f32(n: int) -> Program:
    """The same of floats."""
    constants = {"w": Constant("f32", RNG.standard_normal((n, n)).astype(np.float32))}
    return program([Op("linear_f32", ("x", "w"), ("y",))], TensorType("f32", (n, n)), constants)


def running(made: Program, isa: str, threads: int) -> Callable[[], Any]:
    """A call that runs a program on one random input."""
    kind = made.inputs["x"]
    x = bits(*kind.ints) if kind.dtype == "u8" else RNG.standard_normal(kind.ints).astype(np.float32)
    engine = Engine(made, threads=threads, **({"isa": isa} if isa else {}))
    return lambda: engine.run({"x": x})


def products(isa: str, threads: int, n: int = 1024) -> Calls:
    """Matrix products."""
    a, b = torch.randn(n, n), torch.randn(n, n)
    return {
        "bits to bits": running(product(n, "bits", True), isa, threads),
        "bits to codes": running(product(n, "codes", True), isa, threads),
        "bits to floats": running(product(n, "floats", True), isa, threads),
        "floats to bits": running(product(n, "bits", False), isa, threads),
        "int8": running(product_int8(n), isa, threads),
        "float32": running(product_f32(n), isa, threads),
        "torch": lambda: torch.mm(a, b),
    }


def lowered(model: nn.Module, x: Tensor, how: Recipe, isa: str, threads: int) -> Callable[[], Any]:
    """A call that runs a quantized model."""
    prepared = pw.calibrate(pw.prepare(model, x, how), [x], progress=False)
    made = pw.lower(pw.convert(prepared), x)
    engine = Engine(made, threads=threads, **({"isa": isa} if isa else {}))
    inputs = {next(iter(made.inputs)): x.numpy()}
    return lambda: engine.run(inputs)


def convolution(channels: int, size: int, signs: bool) -> Program:
    """3 x 3 from floats to floats, channels last, packing or rounding included."""
    c = channels
    window = {"stride": [1, 1], "pads": [1, 1, 1, 1], "dilation": [1, 1], "groups": 1}
    constants = {
        "m": Constant("f32", np.full(c, 1e-3, np.float32)),
        "t": Constant("f32", np.zeros(1, np.float32)),
    }
    if signs:
        constants["w"] = Constant("u8", bits(c, c * 9 // 8))
        ops = [Op("sign", ("x", "t"), ("q",), {"groups": 1}),
               Op("conv_binary", ("q", "w"), ("acc",), {"shape": [c, c, 3, 3], **window})]  # fmt: skip
    else:
        constants["w"] = Constant("i8", RNG.integers(-127, 128, (c, c, 3, 3), dtype=np.int8))
        ops = [Op("quantize", ("x",), ("q",), {"scale": 0.03, "zero": 128, "lo": 0, "hi": 255}),
               Op("conv", ("q", "w"), ("acc",), {"zero": 128, **window})]  # fmt: skip
    ops.append(Op("rescale", ("acc", "m"), ("y",), {}))
    return program(ops, TensorType("f32", (1, size, size, c)), constants)


def convolutions(channels: int, size: int, isa: str, threads: int) -> Calls:
    """One layer; PyTorch in both layouts."""
    layer = nn.Conv2d(channels, channels, 3, padding=1).eval()
    last = nn.Conv2d(channels, channels, 3, padding=1).eval().to(memory_format=torch.channels_last)
    x = torch.randn(1, channels, size, size)
    y = x.contiguous(memory_format=torch.channels_last)

    def eager(module: nn.Module, x: Tensor) -> Callable[[], Any]:
        def call() -> Tensor:
            with torch.inference_mode():
                return module(x)  # type: ignore[no-any-return]

        return call

    return {
        "signs": running(convolution(channels, size, True), isa, threads),
        "int8": running(convolution(channels, size, False), isa, threads),
        "torch": eager(layer, x),
        "torch, last": eager(last, y),
    }


def models(model: nn.Module, x: Tensor, isa: str, threads: int, *layers: str) -> Calls:
    """Signs in some layers, int8, and the float model."""
    model = model.eval()

    def eager() -> Tensor:
        with torch.inference_mode():
            return model(x)  # type: ignore[no-any-return]

    return {
        "signs": lowered(model, x, recipe(*layers), isa, threads),
        "int8": lowered(model, x, recipe(), isa, threads),
        "torch": eager,
    }


class Unit(nn.Module):
    """Convolution, norm, and the input added; where it halves the image, the mean of four pixels, twice."""

    def __init__(self, cin: int, cout: int) -> None:
        super().__init__()
        self.halves = cin != cout
        self.conv = nn.Conv2d(cin, cout, 3, 2 if self.halves else 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(cout)
        self.pool = nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        """[N, cin, H, W] -> [N, cout, H', W']."""
        y = self.norm(self.conv(x))
        if self.halves:
            small = self.pool(x)
            x = torch.cat([small, small], 1)
        return y + x


def resnet20() -> nn.Sequential:
    """[N, 3, 32, 32] -> [N, 10]; 18 convolutions between the first and the last layer."""
    widths = [16] * 7 + [32] * 6 + [64] * 6
    units = [Unit(a, b) for a, b in itertools.pairwise(widths)]
    first = [nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)]
    return nn.Sequential(*first, *units, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def table(title: str, calls: Calls, seconds: float, work: float = 0.0, peak: float = 0.0) -> None:
    """Print times, how many times faster than int8 and PyTorch, and of the peak if it is known."""
    found = interleaved(calls, seconds=seconds)
    print(title, flush=True)
    for name, latency in found.items():
        rate = f"  {work / latency.p50 / 1e3:5.2f} T products/s" if work else ""
        rate += (
            f" {100 * work / latency.p50 * 1e9 / peak:5.1f} % of the peak" if peak and "bits" in name else ""
        )
        ours = f"  {latency.speedup_over(found['float32']):6.2f} x float32" if "float32" in found else ""
        print(f"  {name:16s} {latency.ms:8.3f} ms{rate}  {latency.speedup_over(found['int8']):6.2f} x int8{ours}"
              f"  {latency.speedup_over(found['torch']):6.2f} x torch", flush=True)  # fmt: skip


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", default=["product", "conv", "network"])
    parser.add_argument("--isa", default="")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=1.0)
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    where = f"({args.isa or 'strongest instruction set'}, {args.threads} threads)"
    if "product" in args.only:
        peak = macs_per_second("bits", args.isa or default_isa(), args.threads, args.seconds)
        print(f"bits that differ, counted, on registers alone {where}: {peak / 1e12:.2f} T products/s")
        table(f"product 1024^3 {where}", products(args.isa, args.threads), args.seconds, 2.0**30, peak)
    if "conv" in args.only:
        for channels, size in ((256, 14), (128, 28)):
            calls = convolutions(channels, size, args.isa, args.threads)
            work = 9.0 * channels**2 * size**2
            table(f"3 x 3, {channels} at {size} x {size} {where}", calls, args.seconds, work)
    if "network" in args.only:
        x = torch.randn(1, 3, 32, 32)
        table(
            f"like ResNet-20 {where}", models(resnet20(), x, args.isa, args.threads, "*.conv"), args.seconds
        )


if __name__ == "__main__":
    main()

"""Oscillation in a depthwise network at 4 bits: batch-norm re-estimation and oscillation control, with and without.

usage: python benchmarks/depthwise.py [--bits 4] [--epochs 4 3] [--images 60000] [--seeds 0 1] [--threads 2]

A MobileNet-style network (depthwise 3 x 3 and 1 x 1, each with batch norm and ReLU6; 8 pairs, 32 to 128 channels) is
trained on Fashion-MNIST in float (SGD 0.1), then with quantization from there (LSQ, SGD 0.01 down to 0, no teacher):
weights and inputs of the bits given, first and last layer 8 bit. Three runs: plain; with dampening (0 to 0.1 on a
cosine); with iterative freezing (threshold 0.1 down to 0.01). Each is evaluated on the 10,000 test images with the
running statistics as training left them, and after they were estimated anew on 50 batches of 128; `oscillating` is the
share of weights whose code changed in the last 50 steps (weights that are frozen do not).
"""

from __future__ import annotations

import argparse
import copy
import gzip
from collections.abc import Iterator

import numpy as np
import torch
from pictures import data_folder
from torch import Tensor, nn

import pennyweight as pw
from pennyweight import training
from pennyweight.nn.conv import ConvTwin
from pennyweight.nn.rounding import trained
from pennyweight.passes.calibrate import Calibrate
from pennyweight.passes.fold_batch_norm import FoldBatchNorm
from pennyweight.passes.solve import Solve
from pennyweight.passes.train import Train
from pennyweight.plan import Rule
from pennyweight.recipe import Recipe
from pennyweight.spec import QuantSpec

BATCH = 128


def unit(cin: int, cout: int, kernel: int, stride: int, groups: int) -> list[nn.Module]:
    """Convolution, norm, ReLU6."""
    conv = nn.Conv2d(cin, cout, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(cout), nn.ReLU6()]


def network() -> nn.Module:
    """[N, 1, 28, 28] -> [N, 10]."""
    layers = unit(1, 32, 3, 2, 1)
    width = 32
    for cout, stride in ((32, 1), (64, 1), (64, 1), (64, 2), (96, 1), (96, 1), (128, 1), (128, 1)):
        layers += unit(width, width, 3, stride, width) + unit(width, cout, 1, 1, 1)
        width = cout
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


def images(part: str) -> tuple[Tensor, Tensor]:
    """Fashion-MNIST."""
    folder = data_folder() / "fashion_mnist"
    with gzip.open(folder / f"{part}-images-idx3-ubyte.gz") as file:
        x = np.frombuffer(file.read(), np.uint8, offset=16).copy()
    with gzip.open(folder / f"{part}-labels-idx1-ubyte.gz") as file:
        y = np.frombuffer(file.read(), np.uint8, offset=8).copy()
    return (torch.from_numpy(x).view(-1, 1, 28, 28).float() / 255 - 0.286) / 0.353, torch.from_numpy(y).long()


def recipe(bits: int) -> Recipe:
    """Low bits but for the first and last layer."""
    eight, signal = QuantSpec.parse("int8n[1,*]"), QuantSpec.parse("uint8[*]+z")
    low, low_signal = QuantSpec.parse(f"int{bits}[1,*]"), QuantSpec.parse(f"uint{bits}[*]")
    rules = (
        Rule("0", weight=eight, input=signal),
        Rule(types=("Linear",), weight=eight, input=signal),
        Rule(types=("Conv2d",), weight=low, input=low_signal),
        Rule(weight=eight, input=signal, optional=True),
    )
    return Recipe("depthwise", rules, (FoldBatchNorm(), Train(), Calibrate("mse"), Solve("rtn", "mse")))


def codes(model: nn.Module) -> list[Tensor]:
    """The codes of every convolution but the first."""
    twins = [m for m in model.modules() if isinstance(m, ConvTwin)][1:]
    return [q.codes(t.weight.detach().flatten(1)).codes for t in twins for q in trained(t).values()]


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Top-1 in percent."""
    model.eval()
    with torch.no_grad():
        right = sum(
            int((model(a).argmax(1) == b).sum()) for a, b in zip(x.split(500), y.split(500), strict=True)
        )
    return 100 * right / len(y)


class Epochs:
    """Shuffled batches, a new order every time; remembers the codes of 50 steps before the end."""

    def __init__(self, x: Tensor, y: Tensor, seed: int, total: int, model: nn.Module | None = None) -> None:
        self.x, self.y, self.total, self.model = x, y, total, model
        self.made = torch.Generator().manual_seed(seed)
        self.step, self.before = 0, [torch.empty(0)]

    def __call__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for rows in torch.randperm(len(self.y), generator=self.made)[: len(self.y) // BATCH * BATCH].split(
            BATCH
        ):
            if self.model is not None and self.step == self.total - 50:
                self.before = codes(self.model)
            self.step += 1
            yield self.x[rows].contiguous(memory_format=torch.channels_last), self.y[rows]


def main() -> None:
    """Train and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--epochs", type=int, nargs=2, default=(4, 3))
    parser.add_argument("--images", type=int, default=60_000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    x, y = images("train")
    x, y = x[: args.images], y[: args.images]
    test_x, test_y = images("t10k")
    per_epoch = len(y) // BATCH
    for seed in args.seeds:
        torch.manual_seed(seed)
        model = network().to(memory_format=torch.channels_last)
        training.fit(model, Epochs(x, y, seed, 0), epochs=args.epochs[0], steps_per_epoch=per_epoch, lr=0.1, amp=True,
                     schedule=training.Schedule(), reestimate=0)  # fmt: skip
        print(f"seed {seed}: float {accuracy(model, test_x, test_y):.2f}", flush=True)
        for name, options in (
            ("plain", {}), ("dampening", {"dampening": 0.1}), ("freezing", {"freezing": (0.1, 0.01)}),
        ):  # fmt: skip
            prepared = training.prepare(copy.deepcopy(model), x[:64], recipe(args.bits))
            pw.calibrate(prepared, list(x[:512].split(64)), progress=False)
            after = accuracy(prepared, test_x, test_y)
            total = args.epochs[1] * per_epoch
            source = Epochs(x, y, seed + 100, total, prepared)
            training.fit(prepared, source, epochs=args.epochs[1], steps_per_epoch=per_epoch, lr=0.01, amp=True,
                         schedule=training.Schedule(), reestimate=0, **options)  # type: ignore[arg-type]  # fmt: skip
            now = codes(prepared)
            moved = sum(int((a != b).sum()) for a, b in zip(source.before, now, strict=True))
            share = 100 * moved / sum(c.numel() for c in now)
            left = accuracy(prepared, test_x, test_y)
            training.reestimate_batch_norm(prepared, (x[i : i + BATCH] for i in range(0, 50 * BATCH, BATCH)))
            anew = accuracy(prepared, test_x, test_y)
            print(f"  {name}: before training {after:.2f}, trained {left:.2f}, statistics estimated anew {anew:.2f}, "
                  f"oscillating {share:.2f} %", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()

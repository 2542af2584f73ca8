"""Weights of a few levels on Fashion-MNIST: trained, converted, evaluated as integer programs on the engine.

usage: python benchmarks/fashion_lowbit.py [--grids ternary apot4 binary] [--epochs 4 2] [--seed 0] [--threads 2]

The network (three 3 x 3 convolutions of 16, 32 and 64 channels with batch norm and ReLU, pooling between, one linear
layer) is trained in float (SGD 0.1 on a cosine) and, from there, with weights on each grid and activations of 8 bits
(LSQ steps, SGD 0.02 on a cosine, float teacher); with the first and last layer on 8 bits. Each program then sees the
10,000 test images.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from pathlib import Path

import torch
from depthwise import BATCH, Epochs, accuracy, images
from torch import Tensor, nn

import pennyweight as pw
from pennyweight import training
from pennyweight.passes.calibrate import Calibrate
from pennyweight.passes.fold_batch_norm import FoldBatchNorm
from pennyweight.passes.solve import Solve
from pennyweight.passes.train import Train
from pennyweight.plan import Rule
from pennyweight.recipe import Recipe
from pennyweight.spec import QuantSpec


def network() -> nn.Module:
    """[N, 1, 28, 28] -> [N, 10]."""
    layers: list[nn.Module] = []
    for cin, cout in ((1, 16), (16, 32), (32, 64)):
        layers += [
            nn.Conv2d(cin, cout, 3, padding=1, bias=False),
            nn.BatchNorm2d(cout),
            nn.ReLU(),
            nn.MaxPool2d(2),
        ]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 9, 10))


def recipe(grid: str) -> Recipe:
    """The grid for all weights but those of the first and last layer."""
    eight, signal = QuantSpec.parse("int8n[1,*]"), QuantSpec.parse("uint8[*]+z")
    rules = (
        Rule("0", weight=eight, input=signal),
        Rule(types=("Linear",), weight=eight, input=signal),
        Rule(types=("Conv2d",), weight=QuantSpec.parse(f"{grid}[1,*]"), input=signal),
        Rule(weight=eight, input=signal, optional=True),
    )
    return Recipe(grid, rules, (FoldBatchNorm(), Train(), Calibrate("mse"), Solve("rtn", "mse")))


def on_engine(model: nn.Module, x: Tensor, y: Tensor) -> tuple[float, int]:
    """Top-1 in percent of the saved program, and the file's bytes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.dwt"
        pw.save(model, path, example=x[:64])
        session = pw.load(path)
        right = sum(
            int((torch.from_numpy(session(a.numpy())).argmax(1) == b).sum())
            for a, b in zip(x.split(250), y.split(250), strict=True)
        )
        return 100 * right / len(y), path.stat().st_size


def main() -> None:
    """Train and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--grids", nargs="+", default=["ternary", "apot4", "binary"])
    parser.add_argument("--epochs", type=int, nargs=2, default=(4, 2))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    (x, y), (test_x, test_y) = images("train"), images("t10k")
    per_epoch = len(y) // BATCH
    torch.manual_seed(args.seed)
    model = network().to(memory_format=torch.channels_last)
    training.fit(model, Epochs(x, y, args.seed, 0), epochs=args.epochs[0], steps_per_epoch=per_epoch, lr=0.1, amp=True,
                 schedule=training.Schedule(), reestimate=0)  # fmt: skip
    whole = accuracy(model, test_x, test_y)
    print(f"seed {args.seed}, epochs {args.epochs[0]} + {args.epochs[1]}: float {whole:.2f}", flush=True)
    for grid in args.grids:
        prepared = training.prepare(copy.deepcopy(model), x[:64], recipe(grid))
        pw.calibrate(prepared, list(x[:512].split(64)), progress=False)
        training.fit(prepared, Epochs(x, y, args.seed + 100, 0), epochs=args.epochs[1], steps_per_epoch=per_epoch,
                     lr=0.02, amp=True, schedule=training.Schedule(), teacher=model)  # fmt: skip
        trained = accuracy(prepared, test_x, test_y)
        right, size = on_engine(pw.convert(prepared), test_x, test_y)
        print(
            f"  {grid}: trained {trained:.2f}, engine {right:.2f} ({right - whole:+.2f}), {size} bytes",
            flush=True,
        )


if __name__ == "__main__":
    main()

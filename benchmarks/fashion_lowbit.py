"""Weights of a few levels on Fashion-MNIST: trained, converted, evaluated as integer programs on the engine.

usage: python benchmarks/fashion_lowbit.py [--grids ternary apot4 binary w1a1] [--epochs 4 2 6] [--seed 0] [--compile]

The network (three 3 x 3 convolutions of 16, 32 and 64 channels with batch norm and ReLU, pooling between, one linear
layer) is trained in float (SGD 0.1 on a cosine) and, from there, with weights on each grid and activations of 8 bits
(LSQ steps, SGD 0.02 on a cosine, float teacher); with the first and last layer on 8 bits. Each program then sees the
10,000 test images.

w1a1 is another network, of signs: a convolution to 32 channels of 8 bits, six 3 x 3 convolutions of 64 and 128
channels whose weights and inputs are signs, each with norm, shortcut, RSign and RPReLU (`cifar_lowbit.Unit`), the mean
of each channel, a linear layer of 8 bits. Trained from nothing for the third number of epochs: Adam 0.003 on a cosine,
batches of 128, no teacher, images moved by up to 2 pixels and flipped.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import tempfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from cifar_lowbit import Unit, Watch
from cifar_lowbit import recipe as sign_recipe
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


def signs() -> nn.Module:
    """[N, 1, 28, 28] -> [N, 10]. The first and last layer have the names that `sign_recipe` knows."""
    widths = [32, 64, 64, 64, 128, 128, 128]
    layers = {
        "conv1": nn.Conv2d(1, 32, 3, padding=1, bias=False),
        "bn1": nn.BatchNorm2d(32),
        "units": nn.Sequential(*(Unit(a, b) for a, b in itertools.pairwise(widths))),
        "pool": nn.AdaptiveAvgPool2d(1),
        "flat": nn.Flatten(),
        "linear": nn.Linear(128, 10),
    }
    return nn.Sequential(OrderedDict(layers))


class Moved:
    """Epochs of images moved by up to 2 pixels, the same way in a batch of 8, half of them flipped."""

    def __init__(self, epochs: Epochs, seed: int) -> None:
        self.epochs, self.made = epochs, torch.Generator().manual_seed(seed)

    def __call__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for x, y in self.epochs():
            parts = []
            for part in F.pad(x, (2, 2, 2, 2), value=float(x.min())).split(8):
                dy, dx, flip = torch.randint(0, 10, (3,), generator=self.made).tolist()
                part = part[:, :, dy // 2 : dy // 2 + 28, dx // 2 : dx // 2 + 28]
                parts.append(part.flip(-1) if flip < 5 else part)
            yield torch.cat(parts).contiguous(memory_format=torch.channels_last), y


def train_signs(epochs: int, seed: int, compiled: bool, x: Tensor, y: Tensor) -> nn.Module:
    """The network of signs, trained."""
    torch.manual_seed(seed)
    model = training.prepare(signs(), x[:64], sign_recipe("w1a1")).to(memory_format=torch.channels_last)
    with torch.no_grad():
        for batch in (x[:512], x[512:1024]):  # ranges, as they are behind signs; see cifar_lowbit
            model.train()(batch)
    per_epoch = len(y) // BATCH
    batches = Moved(Epochs(x, y, seed + 200, 0), seed)
    groups = training.parameter_groups(model, 0.003, 0.0, quantizer_lr=0.0003)
    training.fit(
        torch.compile(model) if compiled else model, batches, epochs=epochs, steps_per_epoch=per_epoch, lr=0.003,
        optimizer=torch.optim.Adam(groups, 0.003), amp=True, reestimate=0, loss=Watch(0),
        schedule=training.SignSchedule(total=epochs * per_epoch), progress=False,
    )  # fmt: skip
    training.reestimate_batch_norm(model, (x for x, _ in itertools.islice(batches(), 100)))
    return model.eval()


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


def fine_tune(
    grids: list[str], epochs: list[int], seed: int, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]
) -> None:
    """The float network, and each grid from there."""
    (x, y), (test_x, test_y) = train, test
    per_epoch = len(y) // BATCH
    torch.manual_seed(seed)
    model = network().to(memory_format=torch.channels_last)
    training.fit(model, Epochs(x, y, seed, 0), epochs=epochs[0], steps_per_epoch=per_epoch, lr=0.1, amp=True,
                 schedule=training.Schedule(), reestimate=0)  # fmt: skip
    whole = accuracy(model, test_x, test_y)
    print(f"seed {seed}, epochs {epochs[0]} + {epochs[1]}: float {whole:.2f}", flush=True)
    for grid in grids:
        prepared = training.prepare(copy.deepcopy(model), x[:64], recipe(grid))
        pw.calibrate(prepared, list(x[:512].split(64)), progress=False)
        training.fit(prepared, Epochs(x, y, seed + 100, 0), epochs=epochs[1], steps_per_epoch=per_epoch,
                     lr=0.02, amp=True, schedule=training.Schedule(), teacher=model)  # fmt: skip
        trained = accuracy(prepared, test_x, test_y)
        right, size = on_engine(pw.convert(prepared), test_x, test_y)
        print(
            f"  {grid}: trained {trained:.2f}, engine {right:.2f} ({right - whole:+.2f}), {size} bytes",
            flush=True,
        )


def main() -> None:
    """Train and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--grids", nargs="+", default=["ternary", "apot4", "binary", "w1a1"])
    parser.add_argument("--epochs", type=int, nargs=3, default=(4, 2, 6))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="torch.compile the training of w1a1")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    (x, y), (test_x, test_y) = images("train"), images("t10k")
    if grids := [g for g in args.grids if g != "w1a1"]:
        fine_tune(grids, args.epochs, args.seed, (x, y), (test_x, test_y))
    if "w1a1" in args.grids:
        model = train_signs(args.epochs[2], args.seed, args.compile, x, y)
        trained = accuracy(model, test_x, test_y)
        right, size = on_engine(pw.convert(model), test_x, test_y)
        about = f"seed {args.seed}, {args.epochs[2]} epochs"
        print(f"{about}, w1a1: trained {trained:.2f}, engine {right:.2f}, {size} bytes", flush=True)


if __name__ == "__main__":
    main()

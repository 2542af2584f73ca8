"""Ristretto's search: the widths of dynamic fixed point that keep two networks within a point of float.

usage: python benchmarks/ristretto.py [--only lenet resnet20] [--epochs 4] [--goal 0.01] [--formats ristretto]
                                      [--search 2000] [--test 10000]

    lenet      Caffe's LeNet (20 and 50 filters of 5 x 5, 500 units), trained here in float on Fashion-MNIST, seed 0
    resnet20   ResNet-20 of the shared networks on the CIFAR-10 JPEG test set

Integer lengths come from 10 batches of training images. The search evaluates on the first images of the training set
that it has not calibrated with (--search of them); float and integers are then evaluated on the test images: the
converted model eagerly, and its program on the engine, whose outputs must equal those of simulated fixed point bit for
bit (`exact`). `headroom` is what integer lengths of activations have beyond Ristretto's, which are one bit short.
Nothing is fine-tuned. `shifts` counts the program's requantizations by shift, `multipliers` the others.
"""

from __future__ import annotations

import argparse
import gzip
from pathlib import Path

import numpy as np
import torch
from pictures import CIFAR_STRIDE, data_folder, definition, loaded, read_images
from torch import Tensor, nn

import pennyweight as pw
from pennyweight.journal import Journal
from pennyweight.tune import FORMATS
from pennyweight.tune.fixed_point import Simulated


class LeNet(nn.Module):
    """LeNet as Caffe has it. [n, 1, 28, 28] to [n, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 20, 5), nn.Conv2d(20, 50, 5)
        self.pool = nn.MaxPool2d(2)
        self.ip1, self.ip2 = nn.Linear(800, 500), nn.Linear(500, 10)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        x = self.pool(self.conv2(self.pool(self.conv1(x))))
        out: Tensor = self.ip2(self.ip1(x.flatten(1)).relu())
        return out


def fashion(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    """Images [n, 1, 28, 28] of mean 0 and deviation 1, and labels."""
    with gzip.open(folder / "fashion_mnist" / f"{part}-images-idx3-ubyte.gz") as file:
        x = np.frombuffer(file.read(), np.uint8, offset=16)
    with gzip.open(folder / "fashion_mnist" / f"{part}-labels-idx1-ubyte.gz") as file:
        y = np.frombuffer(file.read(), np.uint8, offset=8)
    images = torch.from_numpy(x.copy()).view(-1, 1, 28, 28).float() / 255
    return (images - 0.286) / 0.353, torch.from_numpy(y.copy()).long()


def train(model: nn.Module, x: Tensor, y: Tensor, epochs: int) -> nn.Module:
    """Adam, cosine schedule, batches of 128, seed 0."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * (len(y) // 128))
    for _ in range(epochs):
        order = torch.randperm(len(y), generator=generator)
        for pick in order.split(128)[: len(y) // 128]:
            loss = nn.functional.cross_entropy(model(x[pick]), y[pick])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


Task = tuple[nn.Module, list[Tensor], tuple[Tensor, Tensor], tuple[Tensor, Tensor]]


def lenet(folder: Path, epochs: int, search: int) -> Task:
    """The network, calibration batches, images to search with, test images."""
    torch.manual_seed(0)
    x, y = fashion(folder, "train")
    model = train(LeNet(), x[search + 1280 :], y[search + 1280 :], epochs)
    return (
        model,
        list(x[search : search + 1280].split(128)),
        (x[:search], y[:search]),
        fashion(folder, "t10k"),
    )


def resnet20(folder: Path, epochs: int, search: int) -> Task:
    """The same of the shared ResNet-20, which is trained already."""
    module = definition(folder, "cifar_resnet")
    model = loaded(module.CifarResNet(20), folder / "cifar10" / "resnet20_jpeg.pt")
    archive = folder / "cifar10" / "train50k_jpeg.zip"
    calibration, _ = read_images(archive, slice(0, CIFAR_STRIDE * 500, CIFAR_STRIDE))
    other, labels = read_images(archive, slice(1, 1 + (50_000 // search) * search, 50_000 // search))
    test, wanted = read_images(folder / "cifar10" / "test10k_jpeg.zip")
    normalize = module.normalize
    return (
        model,
        list(normalize(calibration).split(50)),
        (normalize(other), torch.from_numpy(labels)),
        (normalize(test), torch.from_numpy(wanted)),
    )


NETWORKS = {"lenet": lenet, "resnet20": resnet20}


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """The share of right classes."""
    with torch.no_grad():
        right = sum(
            int((model(a).argmax(1) == b).sum()) for a, b in zip(x.split(250), y.split(250), strict=True)
        )
    return right / len(y)


def main() -> None:
    """Search, convert, evaluate on the engine."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=sorted(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--goal", type=float, default=0.01)
    parser.add_argument("--formats", default="ristretto")
    parser.add_argument("--search", type=int, default=2000)
    parser.add_argument("--test", type=int, default=10_000, help="test images, evenly spread")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for name in args.only:
        model, batches, (x, y), (test_x, test_y) = NETWORKS[name](data_folder(), args.epochs, args.search)
        test_x, test_y = test_x[:: 10_000 // args.test], test_y[:: 10_000 // args.test]
        print(f"{name}: {args.formats}, goal {args.goal}, {len(y)} images to search with", flush=True)
        found = pw.tune(
            model,
            batches,
            evaluate=lambda m, x=x, y=y: accuracy(m, x, y),
            goal=args.goal,
            formats=args.formats,
        )
        program = pw.lower(found.model, test_x[:250])
        session = pw.Session(program, threads=args.threads)
        sites = Simulated(model, batches, FORMATS[args.formats], Journal())
        sites.headroom = found.headroom
        simulated = sites.set(found.widths)
        exact, right = True, 0
        for a, b in zip(test_x.split(250), test_y.split(250), strict=True):
            out = torch.from_numpy(session(a.numpy()))
            with torch.no_grad():
                exact = exact and torch.equal(out, simulated(a))
            right += int((out.argmax(1) == b).sum())
        before = accuracy(model, test_x, test_y)
        kinds = [op.kind for op in program.ops]
        shifts = sum(k in ("requant_shift", "requant_add_shift") for k in kinds)
        others = sum(k in ("requant", "requant_add") for k in kinds)
        widths = ", ".join(f"{g} {b}" for g, b in found.widths.items())
        print(
            f"{name}: {widths}, headroom {found.headroom}; test float {100 * before:.2f}, "
            f"engine {100 * right / len(test_y):.2f}; "
            f"exact {exact}; shifts {shifts}, multipliers {others}",
            flush=True,
        )


if __name__ == "__main__":
    main()

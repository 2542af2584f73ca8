"""Quantization-aware training of a small convolutional network with stubs, on Fashion-MNIST."""

import argparse
import gzip
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torch.quantization
from torch import nn
from torch.quantization import DeQuantStub, QuantStub


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.quant = QuantStub()
        self.conv1 = nn.Conv2d(1, 32, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(32)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(64)
        self.relu2 = nn.ReLU()
        self.pool = nn.MaxPool2d(2)
        self.dropout = nn.Dropout(0.25)
        self.fc1 = nn.Linear(64 * 7 * 7, 128)
        self.relu3 = nn.ReLU()
        self.fc2 = nn.Linear(128, 10)
        self.dequant = DeQuantStub()

    def forward(self, x):
        x = self.quant(x)
        x = self.pool(self.relu1(self.bn1(self.conv1(x))))
        x = self.pool(self.relu2(self.bn2(self.conv2(x))))
        x = self.dropout(x.flatten(1))
        x = self.fc2(self.relu3(self.fc1(x)))
        return self.dequant(x)


def images(folder, part):
    """Fashion-MNIST from its IDX files, or noise of its shape where there is no folder."""
    if folder is None:
        generator = torch.Generator().manual_seed(0)
        y = torch.randint(0, 10, (512,), generator=generator)
        return torch.randn(512, 1, 28, 28, generator=generator) + y.view(-1, 1, 1, 1) / 5, y
    x = np.frombuffer(gzip.open(folder / f"{part}-images-idx3-ubyte.gz").read(), np.uint8, offset=16)
    y = np.frombuffer(gzip.open(folder / f"{part}-labels-idx1-ubyte.gz").read(), np.uint8, offset=8)
    x = torch.from_numpy(x.copy()).view(-1, 1, 28, 28).float() / 255
    return (x - 0.286) / 0.353, torch.from_numpy(y.copy()).long()


def train(model, x, y, epochs, rate, seed):
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, weight_decay=1e-4)
    steps = epochs * (len(y) // 128)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for epoch in range(epochs):
        model.train()
        for rows in torch.randperm(len(y), generator=generator)[: len(y) // 128 * 128].split(128):
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
            schedule.step()
        if epoch >= 1:
            model.apply(torch.quantization.disable_observer)
            model.apply(torch.nn.intrinsic.qat.freeze_bn_stats)


def accuracy(model, x, y):
    model.eval()
    with torch.no_grad():
        right = sum(int((model(a).argmax(1) == b).sum()) for a, b in zip(x.split(500), y.split(500)))
    return 100 * right / len(y)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="folder with the IDX files")
    parser.add_argument("--epochs", type=int, nargs=2, default=(4, 2), help="in float, then with quantization")
    parser.add_argument("--out", type=Path, default=Path("out"))
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    x, y = images(args.data, "train")
    test_x, test_y = images(args.data, "t10k")

    model = Network()
    train(model, x, y, args.epochs[0], 0.05, seed=0)
    result = {"float": accuracy(model, test_x, test_y)}
    torch.save(model.state_dict(), args.out / "float.pt")

    model.train()
    model.qconfig = torch.quantization.get_default_qat_qconfig("fbgemm")
    fused = torch.quantization.fuse_modules_qat(
        model, [["conv1", "bn1", "relu1"], ["conv2", "bn2", "relu2"], ["fc1", "relu3"]]
    )
    prepared = torch.quantization.prepare_qat(fused)
    train(prepared, x, y, args.epochs[1], 0.005, seed=1)
    result["trained"] = accuracy(prepared, test_x, test_y)

    converted = torch.quantization.convert(prepared.eval())
    result["converted"] = accuracy(converted, test_x, test_y)
    torch.save(converted.state_dict(), args.out / "int8.pt")
    return converted, test_x, result


if __name__ == "__main__":
    _, _, figures = main()
    for name, value in figures.items():
        print(f"{name}: {value:.2f} %")

"""Quantization-aware training of a ResNet-18 by graph, without stubs."""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.ao.quantization import get_default_qat_qconfig_mapping
from torch.ao.quantization.quantize_fx import convert_fx, prepare_qat_fx


class Block(nn.Module):
    def __init__(self, cin, cout, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(cin, cout, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(cout)
        self.conv2 = nn.Conv2d(cout, cout, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(cout)
        self.downsample = None
        if stride != 1 or cin != cout:
            self.downsample = nn.Sequential(nn.Conv2d(cin, cout, 1, stride, bias=False), nn.BatchNorm2d(cout))

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet18(nn.Module):
    def __init__(self, classes=10, width=64):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        sizes = [width, width, 2 * width, 4 * width, 8 * width]
        self.layers = nn.Sequential(
            *[
                nn.Sequential(Block(a, b, 1 if i == 0 else 2), Block(b, b, 1))
                for i, (a, b) in enumerate(zip(sizes, sizes[1:]))
            ]
        )
        self.fc = nn.Linear(8 * width, classes)

    def forward(self, x):
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        return self.fc(self.layers(x).mean((2, 3)))


def samples(count, seed):
    """Ten patterns in noise."""
    patterns = torch.randn(10, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 10, (count,), generator=generator)
    return patterns[y] + torch.randn(count, 3, 64, 64, generator=generator), y


def train(model, steps, rate):
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9)
    model.train()
    for step in range(steps):
        x, y = samples(16, seed=step + 1)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def accuracy(model):
    x, y = samples(200, seed=10_000)
    model.eval()
    with torch.no_grad():
        return 100 * float((model(x).argmax(1) == y).float().mean())


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--steps", type=int, nargs=2, default=(20, 10), help="in float, then with quantization")
    parser.add_argument("--out", type=Path, default=Path("out"))
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model = ResNet18(width=args.width)
    train(model, args.steps[0], 0.02)
    result = {"float": accuracy(model)}

    model.train()
    prepared = prepare_qat_fx(model, get_default_qat_qconfig_mapping("fbgemm"), samples(2, seed=0)[0])
    train(prepared, args.steps[1], 0.005)
    result["trained"] = accuracy(prepared)

    converted = convert_fx(prepared.eval())
    result["converted"] = accuracy(converted)
    torch.save(converted.state_dict(), args.out / "int8.pt")
    return converted, samples(4, seed=0)[0], result


if __name__ == "__main__":
    _, _, figures = main()
    for name, value in figures.items():
        print(f"{name}: {value:.2f} %")

"""Whole networks: the interpreter and the engine give the same integers, on every instruction set, one thread and two."""

import importlib.util
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pennyweight as pw
from pennyweight.runtime import library
from pennyweight.runtime.engine import Engine

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("PENNYWEIGHT_DATA", ROOT.parent / "shared" / "data"))


def module_of(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


class Block(nn.Module):
    def __init__(self, cin: int, cout: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(cin, cout, 3, stride, 1, bias=False), nn.BatchNorm2d(cout)
        self.conv2, self.bn2 = nn.Conv2d(cout, cout, 3, 1, 1, bias=False), nn.BatchNorm2d(cout)
        self.stride, self.extra = stride, cout - cin

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.extra:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.extra // 2, self.extra // 2))
        return F.relu(x + y)


class ResNet20(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        widths = [16] * 3 + [32] * 3 + [64] * 3
        pairs = zip([16, *widths], widths, strict=False)
        self.blocks = nn.Sequential(*(Block(a, b, 2 if a != b else 1) for a, b in pairs))
        self.head = nn.Linear(64, 10)

    def forward(self, x):
        return self.head(F.avg_pool2d(self.blocks(F.relu(self.bn(self.stem(x)))), 8).flatten(1))


def lively(model: nn.Module, x: torch.Tensor) -> nn.Module:
    """Batch norms with the statistics of random images, and scales and shifts that differ by channel."""
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.momentum = None
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias, 0, 0.2)
    with torch.no_grad():
        model.train()(x)
    return model.eval()


def networks():
    nets = module_of(ROOT / "benchmarks" / "networks.py")
    nets.VOCABULARY = 1000

    def resnet20():
        return lively(ResNet20(), torch.randn(8, 3, 32, 32)), [(torch.randn(2, 3, 32, 32),) for _ in range(2)]

    def mobilenet_v2():
        model = lively(nets.MobileNetV2(), torch.randn(4, 3, 96, 96))
        return model, [(torch.randn(1, 3, 96, 96),) for _ in range(2)]

    def minilm():
        mask = (torch.arange(32) < 27).long().unsqueeze(0)
        return nets.MiniLM().eval(), [(torch.randint(0, 1000, (1, 32)), mask) for _ in range(2)]

    return {"resnet20": resnet20, "mobilenet_v2": mobilenet_v2, "minilm": minilm}


def same_integers(program, inputs) -> None:
    want = pw.interpret(program, inputs)
    for isa in library.supported_isas():
        for threads in (1, 2):
            got = Engine(program, threads=threads, isa=isa).run(inputs)
            for name, value in want.items():
                assert np.array_equal(value, got[name]), f"{isa}, {threads} threads: {name}"


@pytest.mark.parametrize("name", ["resnet20", "mobilenet_v2", "minilm"])
def test_the_same_integers(name):
    torch.manual_seed(1)
    model, batches = networks()[name]()
    quantized = pw.quantize(model, batches, "int8", progress=False)
    program = pw.lower(quantized, batches[0])
    inputs = dict(zip(program.inputs, [x.numpy() for x in batches[1]], strict=True))
    same_integers(program, inputs)
    with torch.no_grad():
        ours = torch.from_numpy(next(iter(pw.interpret(program, inputs).values())))
        assert float(F.cosine_similarity(ours, model(*batches[1])).min()) > 0.9


def real_network(name: str):
    if not DATA.is_dir():
        pytest.skip(f"real data are not here: {DATA}")
    accuracy = module_of(ROOT / "benchmarks" / "accuracy.py")
    return accuracy.NETWORKS[name](DATA, 8)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet20_jpeg", "mobilenet_v2", "mcunet", "squeezenet"])
def test_real_weights_on_real_images(name):
    network = real_network(name)
    batches = list(network.calibration_batches())[:2]
    program = pw.lower(pw.quantize(network.model, batches, progress=False), batches[0][:4])
    images = network.prepare(network.images[:4]).contiguous().numpy()
    same_integers(program, {next(iter(program.inputs)): images})

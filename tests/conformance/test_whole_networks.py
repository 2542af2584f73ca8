"""Whole networks: the interpreter and the engine give the same integers.

All networks of the benchmarks scaled down, and the real ones of the shared data; every instruction set of this machine,
one thread and several, batches from 1 to 32, sequences of any length.
"""

import functools
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
from pennyweight.program.ops import definitions
from pennyweight.runtime import library
from pennyweight.runtime.engine import Engine
from pennyweight.runtime.widen import widened

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


@functools.cache
def benchmark_networks():
    """The module of the networks that speed is measured on, with a small vocabulary."""
    nets = module_of(ROOT / "benchmarks" / "networks.py")
    nets.VOCABULARY = 500
    return nets


def images(n: int, size: int = 32) -> tuple[torch.Tensor, ...]:
    return (torch.randn(n, 3, size, size),)


def tokens(n: int, length: int = 20) -> tuple[torch.Tensor, ...]:
    lengths = torch.randint(max(length // 2, 1), length + 1, (n, 1))
    return torch.randint(0, 500, (n, length)), (torch.arange(length)[None] < lengths).long()


def steps(n: int, length: int = 6) -> tuple[torch.Tensor, ...]:
    return (torch.randn(n, length, 512),)


# network of the benchmarks -> a smaller one of the same kind, and batches of n for it
SCALED = {
    "resnet50": (lambda nets: lively(nets.ResNet50(), images(4)[0]), images),
    "resnet18": (lambda nets: lively(nets.ResNet18(), images(4)[0]), images),
    "mobilenet_v2": (lambda nets: lively(nets.MobileNetV2(), images(4, 64)[0]), lambda n: images(n, 64)),
    "minilm": (lambda nets: nets.MiniLM(depth=2).eval(), tokens),
    "bert_base": (lambda nets: nets.MiniLM(768, 1, 12).eval(), tokens),
    "lstm": (lambda nets: nets.Recurrent().eval(), steps),
}


def lowered(model: nn.Module, batches, recipe: str):
    """The program of the quantized model, made with the first batch as the example."""
    return pw.lower(pw.quantize(model, batches, recipe, progress=False), batches[0])


def exact(program) -> bool:
    """Whether every op must give the same bits everywhere."""
    return all(definitions[op.kind].exact for op in program.ops)


def same_integers(program, *batches, pools=(1, 2, 3)) -> None:
    """Interpreter and engine agree on every batch, in the order given, on all instruction sets and numbers of threads.

    A program with float products agrees with itself: bit for bit on one instruction set, closely with the interpreter.
    """
    given = [
        dict(zip(program.inputs, [x.contiguous().numpy() for x in batch], strict=True)) for batch in batches
    ]
    wanted = [pw.interpret(program, inputs) for inputs in given]
    for isa in library.supported_isas():
        first = wanted if exact(program) else []
        for threads in pools:
            engine = Engine(widened(program), threads=threads, isa=isa)
            results = [engine.run(inputs) for inputs in given]
            first = first or results
            for inputs, got, want, near in zip(given, results, first, wanted, strict=True):
                shapes = [a.shape for a in inputs.values()]
                for name, value in want.items():
                    assert np.array_equal(value, got[name]), f"{isa}, {threads} threads: {name} {shapes}"
                    scale = max(float(np.abs(near[name]).max()), 1e-6)
                    assert float(np.abs(got[name] - near[name]).max()) < 0.1 * scale, (
                        f"{isa}: {name} {shapes}"
                    )


def test_every_network_of_the_benchmarks_is_here():
    assert set(SCALED) == set(benchmark_networks().NETWORKS)


@pytest.mark.parametrize("recipe", ["int8", "int8-dynamic"])
@pytest.mark.parametrize("name", SCALED)
def test_the_same_integers(name, recipe):
    torch.manual_seed(1)
    make, batch = SCALED[name]
    model = make(benchmark_networks())
    batches = [batch(2) for _ in range(3)]
    program = lowered(model, batches[:2], recipe)
    assert exact(program) or recipe == "int8-dynamic"
    same_integers(program, batches[2])
    with torch.no_grad():
        inputs = dict(zip(program.inputs, [x.numpy() for x in batches[2]], strict=True))
        ours = torch.from_numpy(next(iter(pw.interpret(program, inputs).values())))
        assert float(F.cosine_similarity(ours, model(*batches[2])).min()) > 0.8


def test_residual_network_of_cifar():
    torch.manual_seed(1)
    model = lively(ResNet20(), torch.randn(8, 3, 32, 32))
    same_integers(lowered(model, [images(2), images(2)], "int8"), images(2))


# -- sizes: large ones first, so that a small run finds the memory of a large one ------------------------------------

RAGGED = (32, 1, 17, 2, 31, 3, 16, 4, 9, 5, 8, 15, 7)


def test_sizes(cnn, pictures):
    program = lowered(cnn, [(x,) for x in pictures], "int8")
    same_integers(program, *(images(n, 8) for n in RAGGED))


@pytest.mark.parametrize("recipe", ["int8", "int8-dynamic"])
def test_lengths(recipe):
    torch.manual_seed(3)
    program = lowered(benchmark_networks().MiniLM(64, 2, 4).eval(), [tokens(2), tokens(2)], recipe)
    assert [str(t) for t in program.inputs.values()] == ["i64[batch, length]"] * 2
    pairs = [(3, 70), (1, 1), (2, 33), (1, 128), (5, 16), (1, 2), (4, 31), (1, 17), (7, 5), (1, 65)]
    same_integers(program, *(tokens(n, length) for n, length in pairs))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["int8", "int8-dynamic"])
@pytest.mark.parametrize("name", SCALED)
def test_every_batch_to_32(name, recipe):
    torch.manual_seed(4)
    make, batch = SCALED[name]
    program = lowered(make(benchmark_networks()), [batch(2), batch(2)], recipe)
    order = [*RAGGED, *(n for n in range(1, 33) if n not in RAGGED)]
    same_integers(program, *(batch(n) for n in order), pools=(2,))


# -- real weights on real inputs -------------------------------------------------------------------------------------


def real_network(name: str):
    if not DATA.is_dir():
        pytest.skip(f"real data are not here: {DATA}")
    accuracy = module_of(ROOT / "benchmarks" / "accuracy.py")
    return accuracy.NETWORKS[name](DATA, 8)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["int8", "int8-dynamic"])
@pytest.mark.parametrize("name", ["resnet20_jpeg", "resnet56", "mobilenet_v2", "mcunet", "squeezenet"])
def test_real_weights_on_real_images(name, recipe):
    network = real_network(name)
    batches = [(b,) for b in list(network.calibration_batches())[:2]]
    program = lowered(network.model, [(batches[0][0][:4],), batches[1]], recipe)
    pictures = [
        network.prepare(network.images[i]).contiguous() for i in (slice(0, 4), slice(4, 5), slice(5, 8))
    ]
    same_integers(program, *((x,) for x in pictures))


def sequence_network(name: str):
    """A real recurrent network, calibration batches, and batches of other sizes."""
    if not DATA.is_dir():
        pytest.skip(f"real data are not here: {DATA}")
    source = module_of(DATA / "networks" / f"{name}.py")
    if name == "fsdd_lstm":
        arrays = np.load(DATA / "audio" / "fsdd_logmel.npz")
        x, n, _ = source.tensors(arrays, "test")
        model = source.DigitLSTM()
        model.load_state_dict(torch.load(DATA / "audio" / "fsdd_lstm.pt"))
        return model.eval(), [(x[:32], n[:32])], [(x[:4], n[:4]), (x[4:11, :40], n[4:11].clamp(max=40))]
    stored = torch.load(DATA / "lm" / "char_lstm_shakespeare.pt")
    model = source.CharLSTM(len(stored["state"]["out.bias"]))
    model.load_state_dict(stored["state"])
    text = (DATA / "lm" / "tinyshakespeare.txt").read_text(encoding="utf8")[:4096]
    ids = torch.tensor([stored["vocab"][c] for c in text if c in stored["vocab"]])[:2048].view(8, 256)
    return model.eval(), [(ids[:, :64],)], [(ids[:3, :20],), (ids[3:4, :57],), (ids[:, :1],)]


@pytest.mark.parametrize("recipe", ["int8", "int8-dynamic"])
@pytest.mark.parametrize("name", ["fsdd_lstm", "char_lstm"])
def test_real_weights_on_real_sequences(name, recipe):
    model, calibration, batches = sequence_network(name)
    with torch.no_grad():
        program = lowered(model, calibration, recipe)
    assert exact(program)
    same_integers(program, *batches)

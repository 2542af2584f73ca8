"""Quantization-aware training of ResNet-20 on the CIFAR-10 JPEG images, beside post-training quantization and float.

usage: python benchmarks/qat.py train --bits 4 --method lsq [--distill] [--epochs 6] [--threads 1] --out FOLDER
       python benchmarks/qat.py evaluate FOLDER/NAME.pt ...
       python benchmarks/qat.py ptq --bits 8 4 3 2
       python benchmarks/qat.py step [--bits 8] [--batch 128]

Trains `resnet20_jpeg` (50,000 training images, crops and flips), writes the state dict; `evaluate` converts it, lowers
it to an integer program and runs that on the engine over the 10,000 test images. First and last layer 8 bit, residual
sums and the pool 8 bit, all other weights (per channel) and inputs (per tensor) of the bits given; --bits 32 trains the
float network on the same schedule. `ptq` calibrates the same grids on 512 training images (every 97th), best of
min-max and mean-square ranges. `step` measures a training step against the float one, pairs interleaved.

SGD with momentum 0.9, batches of 128, cosine to 0, seed 0; learning rate 0.01 (8 bit 0.003), weight decay 1e-4 at 8 and
4 bits, 5e-5 at 3, 2.5e-5 at 2; computed in bfloat16 where autocast allows. Teacher: the network itself in float, T = 1.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pictures import data_folder, definition, read_images
from torch import Tensor, nn

import pennyweight as pw
from pennyweight import training
from pennyweight.measure import interleaved
from pennyweight.passes.calibrate import Calibrate
from pennyweight.passes.fold_batch_norm import FoldBatchNorm
from pennyweight.passes.solve import Solve
from pennyweight.passes.train import Train
from pennyweight.plan import Rule
from pennyweight.recipe import Recipe
from pennyweight.spec import QuantSpec

DECAY = {32: 1e-4, 8: 1e-4, 4: 1e-4, 3: 5e-5, 2: 2.5e-5}
BATCH = 128


def recipe(bits: int, method: str | None, ranges: str = "mse") -> Recipe:
    """The grids of the table; with a method, trainable."""
    eight, any_ = QuantSpec.parse("int8n[1,*]"), QuantSpec.parse("uint8[*]+z")
    low = QuantSpec.parse("int8n[1,*]" if bits == 8 else f"int{bits}[1,*]")
    signal = QuantSpec.parse("uint8[*]+z" if bits == 8 else f"uint{bits}[*]")
    rules = (
        Rule("conv1", weight=eight, input=any_),
        Rule("linear", weight=eight, input=any_),
        Rule(types=("Conv2d",), weight=low, input=signal),
        Rule(weight=eight, input=any_, optional=True),
    )
    options = {"steps": 16, "shrink": 0.4} if ranges == "mse" else {}
    inputs = Calibrate("mse") if ranges == "mse" else Calibrate("minmax")
    train = (Train(weight=method, input=method),) if method else ()
    return Recipe(f"w{bits}a{bits}", rules, (FoldBatchNorm(), *train, inputs, Solve("rtn", ranges, options)))


class Data:
    """Both sets as uint8 tensors, and the network's own normalisation."""

    def __init__(self, train: bool = True) -> None:
        self.definitions = definition(data_folder(), "cifar_resnet")
        folder = data_folder() / "cifar10"
        self.test_x, self.test_y = read_images(folder / "test10k_jpeg.zip")
        if train:
            x, y = read_images(folder / "train50k_jpeg.zip")
            self.train_x, self.train_y = (
                torch.from_numpy(x).permute(0, 3, 1, 2).contiguous(),
                torch.from_numpy(y),
            )
        self.mean = torch.tensor(self.definitions.MEAN).view(1, 3, 1, 1)
        self.std = torch.tensor(self.definitions.STD).view(1, 3, 1, 1)

    def network(self) -> nn.Module:
        """ResNet-20, trained on the JPEG images."""
        model: nn.Module = self.definitions.CifarResNet(20)
        weights = torch.load(data_folder() / "cifar10" / "resnet20_jpeg.pt", weights_only=True)
        model.load_state_dict(weights)
        return model.eval()

    def normal(self, x: Tensor) -> Tensor:
        """uint8 [n, 3, 32, 32] to the network's input."""
        return (x.float() / 255 - self.mean) / self.std

    def calibration(self) -> list[Tensor]:
        """512 training images, every 97th."""
        x = self.normal(self.train_x[::97][:512])
        return list(x.split(64))

    def epoch(self, seed: int, shift: int = 4) -> Iterator[tuple[Tensor, Tensor]]:
        """Shuffled batches, moved by up to `shift` pixels and flipped."""
        rng = np.random.default_rng(seed)
        order = torch.from_numpy(rng.permutation(len(self.train_y)))
        padded = F.pad(self.train_x, (shift,) * 4)
        for rows in order[: len(order) // BATCH * BATCH].split(BATCH):
            images = torch.empty(BATCH, 3, 32, 32, dtype=torch.uint8)
            for i, row in enumerate(rows.tolist()):
                dy, dx, flip = (int(rng.integers(0, n)) for n in (2 * shift + 1, 2 * shift + 1, 2))
                crop = padded[row, :, dy : dy + 32, dx : dx + 32]
                images[i] = crop.flip(-1) if flip else crop
            x = self.normal(images).contiguous(memory_format=torch.channels_last)
            yield x, self.train_y[rows]

    @property
    def steps(self) -> int:
        """Batches of an epoch."""
        return len(self.train_y) // BATCH


def train(args: argparse.Namespace) -> None:
    """Train one cell of the table."""
    torch.manual_seed(0)
    data = Data()
    teacher = data.network().to(memory_format=torch.channels_last) if args.distill else None
    model = data.network()
    if args.bits < 32:
        model = training.prepare(model, data.calibration()[0], recipe(args.bits, args.method))
        pw.calibrate(model, data.calibration(), progress=False)
    model = model.to(memory_format=torch.channels_last)
    lr = args.lr or (0.003 if args.bits == 8 else 0.01)
    seeds = iter(range(1, 1000))
    start = time.perf_counter()
    done = training.fit(
        model, lambda: data.epoch(next(seeds)), epochs=args.epochs, steps_per_epoch=data.steps, lr=lr,
        weight_decay=DECAY[args.bits], teacher=teacher, amp=not args.float32, reestimate=100,
        schedule=training.Schedule(freeze_ranges=args.epochs * data.steps // 2),
    )  # fmt: skip
    name = f"w{args.bits}_{args.method}{'_kd' if args.distill else ''}_{args.epochs}"
    folder = Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    about = {
        "bits": args.bits,
        "method": args.method,
        "distill": args.distill,
        "epochs": args.epochs,
        "lr": lr,
    }
    torch.save({"state": model.state_dict(), "about": about}, folder / f"{name}.pt")
    simulated = accuracy(model, data)
    print(f"{name}: losses {[round(x, 3) for x in done.losses]}, {time.perf_counter() - start:.0f} s, "
          f"top-1 of the trained module {simulated:.2f}", flush=True)  # fmt: skip


def accuracy(model: Any, data: Data) -> float:
    """Top-1 on the 10,000 test images, in percent. `model`: a module or a session."""
    right = 0
    x = torch.from_numpy(data.test_x).permute(0, 3, 1, 2)
    with torch.no_grad():
        for images, labels in zip(x.split(250), torch.from_numpy(data.test_y).split(250), strict=True):
            batch = data.normal(images)
            y = model(batch) if isinstance(model, nn.Module) else torch.from_numpy(model(batch.numpy()))
            right += int((y.argmax(-1) == labels).sum())
    return 100 * right / len(data.test_y)


def on_engine(model: nn.Module, example: Tensor, data: Data, folder: Path) -> tuple[float, int]:
    """Top-1 of the integer program, and the bytes of its file."""
    path = folder / "network.dwt"
    pw.save(pw.convert(model), path, example=example)
    return accuracy(pw.load(path), data), path.stat().st_size


def evaluate(args: argparse.Namespace) -> None:
    """Integer programs of what was trained."""
    data = Data(train=False)
    example = data.normal(torch.from_numpy(data.test_x[:64]).permute(0, 3, 1, 2))
    for path in map(Path, args.files):
        found = torch.load(path, weights_only=True)
        about = found["about"]
        if about["bits"] == 32:
            model = data.network()
            model.load_state_dict(found["state"])
            print(f"{path.stem}: float {accuracy(model, data):.2f}", flush=True)
            continue
        model = training.prepare(data.network(), example, recipe(about["bits"], about["method"]))
        model.load_state_dict(found["state"])
        top, size = on_engine(model, example, data, path.parent)
        print(f"{path.stem}: engine {top:.2f} (module {accuracy(model, data):.2f}), {size} bytes", flush=True)


def ptq(args: argparse.Namespace) -> None:
    """The same grids without training."""
    data = Data()
    calibration = data.calibration()
    for bits in args.bits:
        for ranges in ("minmax", "mse"):
            model = pw.prepare(data.network(), calibration[0], recipe(bits, None, ranges))
            pw.calibrate(model, calibration, progress=False)
            top, _ = on_engine(model, calibration[0], data, Path(args.out))
            print(f"ptq w{bits}a{bits} {ranges}: engine {top:.2f}", flush=True)


def step(args: argparse.Namespace) -> None:
    """A training step against the float step, interleaved pairs."""
    data = Data()
    x, y = next(data.epoch(1))
    models = {"float": data.network()}
    for method in ("clipped", "lsq"):
        prepared = training.prepare(data.network(), x, recipe(args.bits, method))
        models[method] = pw.calibrate(prepared, [x], progress=False)
    makers = {n: torch.optim.SGD(m.train().parameters(), 0.01, 0.9) for n, m in models.items()}

    def one(name: str) -> Callable[[], None]:
        def run() -> None:
            with torch.autocast("cpu", torch.bfloat16, enabled=args.amp):
                value = F.cross_entropy(models[name](x), y)
            makers[name].zero_grad()
            value.backward()
            makers[name].step()

        return run

    print_ratios({name: one(name) for name in models}, args.rounds)


def print_ratios(steps: dict[str, Callable[[], None]], rounds: int) -> None:
    """Milliseconds of each step, and the median of its paired ratios to "float"."""
    found = interleaved(steps, seconds=0.0, rounds=rounds)
    for name, latency in found.items():
        print(f"{name}: {latency.ms:.1f} ms a step, {found['float'].speedup_over(latency):.2f}x float")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    one = verbs.add_parser("train")
    one.add_argument("--bits", type=int, required=True)
    one.add_argument("--method", default="lsq")
    one.add_argument("--distill", action="store_true")
    one.add_argument("--epochs", type=int, default=6)
    one.add_argument("--lr", type=float)
    one.add_argument("--float32", action="store_true")
    two = verbs.add_parser("evaluate")
    two.add_argument("files", nargs="+")
    three = verbs.add_parser("ptq")
    three.add_argument("--bits", type=int, nargs="+", default=[8, 4, 3, 2])
    four = verbs.add_parser("step")
    four.add_argument("--bits", type=int, default=8)
    four.add_argument("--rounds", type=int, default=15)
    four.add_argument("--amp", action="store_true")
    for sub in (one, two, three, four):
        sub.add_argument("--threads", type=int, default=2)
        sub.add_argument("--out", default="qat_runs")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    {"train": train, "evaluate": evaluate, "ptq": ptq, "step": step}[args.verb](args)


if __name__ == "__main__":
    main()

"""ResNet-20 on the CIFAR-10 JPEG images with weights of a few levels, and with signs: trained, run as integers.

usage: python benchmarks/cifar_lowbit.py train --format apot4 [--epochs 3] [--lr 0.01] [--decay 5e-5] --out FOLDER
       python benchmarks/cifar_lowbit.py train --format w1a1 [--epochs 12] [--lr 0.002] [--decay 0]  --out FOLDER
       python benchmarks/cifar_lowbit.py evaluate FOLDER/NAME.pt ...
       python benchmarks/cifar_lowbit.py ptq --grids int4 pot4 pot5 apot4 apot3

Formats: apot4, apot3, ternary, binary are the grid of the weights (one scale per output channel), activations have 8
bits; first and last layer, residual sums and the pool 8 bit. They start from `resnet20_jpeg` and train its own
network: LSQ steps, SGD with momentum 0.9 ("binary": `Signs` on the weights, Adam).

w1a1 is the same network with a shortcut round every convolution (Bi-Real), RSign before and RPReLU behind it, signs
for weights and activations of all but the first and last layer, which have 8 bits; a stage's first shortcut is the
mean of four pixels, twice over. Weights start from `resnet20_jpeg`. Adam, slope "approx", no decay.

All: batches of 128 with crops and flips, cosine to 0, seed 0, bfloat16 autocast, cross entropy plus divergence from
the float network (T = 1), batch norms estimated anew on 100 batches. The state is saved after every epoch; `evaluate`
converts it, lowers it to an integer program and runs that on the engine over the 10,000 test images. With --compile the
training graph is compiled; sums are then in float while it trains, and calibrated for the program. `ptq` puts the
weights on grids without training: least-squares scales per channel, activations of 8 bits.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from qat import Data, accuracy, on_engine
from torch import Tensor, nn

import pennyweight as pw
from pennyweight import training
from pennyweight.errors import UnrealisableSite
from pennyweight.passes.calibrate import Calibrate
from pennyweight.passes.fold_batch_norm import FoldBatchNorm
from pennyweight.passes.solve import Solve
from pennyweight.passes.train import Train
from pennyweight.plan import Rule
from pennyweight.recipe import Recipe
from pennyweight.spec import QuantSpec

FORMATS = ("apot4", "apot3", "ternary", "binary", "w1a1")
SIGNS = ("binary", "w1a1")
EIGHT, SIGNAL = QuantSpec.parse("int8n[1,*]"), QuantSpec.parse("uint8[*]+z")


class Unit(nn.Module):
    """`RPReLU(norm(conv(sign(x + b))) + shortcut)`. [N, cin, h, w] to [N, cout, h', w']."""

    def __init__(self, cin: int, cout: int) -> None:
        super().__init__()
        self.halves = cin != cout
        self.sign = training.RSign(cin)
        self.conv = nn.Conv2d(cin, cout, 3, 2 if self.halves else 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(cout)
        self.act = training.RPReLU(cout)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        y = self.norm(self.conv(self.sign(x)))
        if self.halves:
            small = F.avg_pool2d(x, 2)
            x = torch.cat([small, small], 1)
        out: Tensor = self.act(y + x)
        return out


class SignNet(nn.Module):
    """ResNet-20 with a shortcut round every convolution. [N, 3, 32, 32] to [N, 10]."""

    def __init__(self) -> None:
        super().__init__()
        widths = [16] * 7 + [32] * 6 + [64] * 6
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.units = nn.Sequential(*(Unit(a, b) for a, b in itertools.pairwise(widths)))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        out: Tensor = self.linear(self.pool(self.units(self.bn1(self.conv1(x)))).flatten(1))
        return out

    def start_from(self, network: Any) -> SignNet:
        """Take the weights of the float network, convolution by convolution."""
        blocks = [b for stage in (network.layer1, network.layer2, network.layer3) for b in stage]
        convolutions = [c for b in blocks for c in (b.conv1, b.conv2)]
        with torch.no_grad():
            for unit, conv in zip(self.units, convolutions, strict=True):
                unit.conv.weight.copy_(conv.weight)  # type: ignore[union-attr, operator]
        for name in ("conv1", "bn1", "linear"):
            getattr(self, name).load_state_dict(getattr(network, name).state_dict())
        return self


def recipe(name: str, slope: str | None = "approx", sums: bool = True) -> Recipe:
    """The format in all convolutions but the first; without `sums` nothing but layers is rounded.

    slope: of signs; None: nothing is trained.
    """
    if name == "w1a1":
        weight, signal = QuantSpec.parse("binary[1,*]"), QuantSpec.parse("binary[*]")
        options = {"slope": slope} if slope else {}
        train = Train("signs", "signs", options, options)
    else:
        weight, signal = QuantSpec.parse(f"{name}[1,*]"), SIGNAL
        train = Train("signs" if name == "binary" else "lsq", "lsq")
    rules = [
        Rule("conv1", weight=EIGHT, input=SIGNAL),
        Rule("linear", weight=EIGHT, input=SIGNAL),
        Rule(types=("Conv2d",), weight=weight, input=signal),
    ]
    if sums:  # those of w1a1 stay in float, its pool does not
        types = ("AdaptiveAvgPool2d",) if name == "w1a1" else ()
        rules.append(Rule(types=types, weight=EIGHT, input=SIGNAL, optional=True))
    solve = Solve("rtn", "mse", {"steps": 16, "shrink": 0.4})
    if slope is None:
        return Recipe(name, tuple(rules), (FoldBatchNorm(), Calibrate("mse"), Solve("rtn", "mse")))
    return Recipe(name, tuple(rules), (FoldBatchNorm(), train, Calibrate("mse"), solve))


def network(name: str, data: Data) -> nn.Module:
    """What is trained, in float."""
    return SignNet().start_from(data.network()).eval() if name == "w1a1" else data.network()


def prepared(name: str, slope: str, data: Data, sums: bool) -> nn.Module:
    """Ready to train, ranges from training images."""
    batches = data.calibration()
    model = training.prepare(network(name, data), batches[0], recipe(name, slope, sums))
    return observe_rounded(model, batches) if name == "w1a1" else pw.calibrate(model, batches, progress=False)


def observe_rounded(model: nn.Module, batches: list[Tensor]) -> nn.Module:
    """Set ranges as they are behind signs and norms of the batch, which calibration, in float, would not see."""
    with torch.no_grad():
        for batch in batches[:2]:  # the first sets them, the second confirms that they are there
            model.train()(batch)
    return model


def restored(found: dict[str, Any], data: Data) -> nn.Module:
    """The trained model; sums that were not rounded in training are calibrated now."""
    name, batches = found["about"]["format"], data.calibration()
    model = training.prepare(network(name, data), batches[0], recipe(name))
    missing = model.load_state_dict(found["state"], strict=False).missing_keys
    if missing:
        if name in SIGNS:
            observe_rounded(model, batches)
        else:
            pw.calibrate(model, batches, progress=False)
        model.load_state_dict(found["state"], strict=False)
        print(f"calibrated after training: {len({k.rpartition('.')[0] for k in missing})} sites", flush=True)
    return model.eval()


class Watch:
    """Cross entropy that prints its mean and the share of right classes every 130 steps."""

    def __init__(self, limit: int) -> None:
        self.sums, self.step, self.start, self.limit = [0.0, 0.0], 0, time.perf_counter(), limit

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        value = F.cross_entropy(output, target)
        right = (output.detach().argmax(1) == target).float().mean()
        self.sums = [self.sums[0] + float(value.detach()), self.sums[1] + float(right)]
        self.step += 1
        if self.step % 130 == 0:
            loss, share = (s / 130 for s in self.sums)
            seconds = time.perf_counter() - self.start
            print(
                f"  step {self.step}, {seconds:.0f} s: loss {loss:.3f}, train {100 * share:.1f}", flush=True
            )
            self.sums = [0.0, 0.0]
        if self.step == self.limit:
            raise SystemExit
        return value


def train(args: argparse.Namespace) -> None:
    """Train one format."""
    torch.manual_seed(0)
    data = Data()
    teacher: Any = data.network().to(memory_format=torch.channels_last)
    signs = args.format in SIGNS
    model = prepared(args.format, args.slope, data, args.format == "w1a1" or not args.compile)
    model = model.to(memory_format=torch.channels_last)
    lr = args.lr or (0.002 if signs else 0.01)
    steps = args.steps or data.steps
    total = args.epochs * steps
    folder = Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{args.format}{args.name}_{args.epochs}.pt"
    about = {
        "format": args.format,
        "epochs": args.epochs,
        "steps": steps,
        "lr": lr,
        "decay": args.decay,
        "slope": args.slope,
        "real": args.real,
        "shift": args.shift,
    }
    seeds = iter(range(1000))

    def save(done: int) -> None:
        torch.save({"state": model.state_dict(), "about": {**about, "done": done}}, path)

    def epoch() -> Iterator[tuple[Tensor, Tensor]]:
        seed = next(seeds)
        if seed:
            save(seed)
        return itertools.islice(data.epoch(seed + 1, args.shift), steps)

    optimizer = None
    if signs:
        groups = training.parameter_groups(model, lr, args.decay, quantizer_lr=lr / 10)
        optimizer = torch.optim.Adam(groups, lr)
    schedule = training.Schedule(freeze_ranges=None if signs else total // 2)
    if args.format == "w1a1":
        schedule = training.SignSchedule(weights=int(args.real * total), total=total)
    start = time.perf_counter()
    trained: Any = model
    if args.compile:
        trained, teacher = torch.compile(model), torch.compile(teacher)
    done = training.fit(
        trained, epoch, epochs=args.epochs, steps_per_epoch=steps, lr=lr, weight_decay=args.decay,
        teacher=teacher, amp=True, reestimate=0, schedule=schedule, loss=Watch(args.limit), optimizer=optimizer,
        progress=False,
    )  # fmt: skip
    training.reestimate_batch_norm(model, (x for x, _ in itertools.islice(data.epoch(0), 100)))
    save(args.epochs)
    print(f"{path.stem}: losses {[round(x, 3) for x in done.losses]}, {time.perf_counter() - start:.0f} s, "
          f"top-1 of the trained module {accuracy(model, data):.2f}", flush=True)  # fmt: skip


def evaluate(args: argparse.Namespace) -> None:
    """Integer programs of what was trained."""
    data = Data()
    example = data.normal(torch.from_numpy(data.test_x[:64]).permute(0, 3, 1, 2))
    whole = accuracy(data.network(), data)
    for path in map(Path, args.files):
        found = torch.load(path, weights_only=True)
        about = found["about"]
        model = restored(found, data)
        top, size = on_engine(model, example, data, path.parent)
        print(f"{path.stem} ({about['done']} epochs): engine {top:.2f} ({top - whole:+.2f} from float {whole:.2f}), "
              f"module {accuracy(model, data):.2f}, {size} bytes", flush=True)  # fmt: skip


def ptq(args: argparse.Namespace) -> None:
    """Weights on grids without training."""
    data = Data()
    batches = data.calibration()
    for grid in args.grids:
        model = pw.prepare(data.network(), batches[0], recipe(grid, None))
        pw.calibrate(model, batches, progress=False)
        try:
            top, size = on_engine(model, batches[0], data, Path(args.out))
            print(f"ptq {grid}: engine {top:.2f}, {size} bytes", flush=True)
        except UnrealisableSite:  # levels that need more than 8 bits, as those of pot5
            print(f"ptq {grid}: simulated {accuracy(model, data):.2f}", flush=True)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    one = verbs.add_parser("train")
    one.add_argument("--format", choices=FORMATS, required=True)
    one.add_argument("--epochs", type=int, default=3)
    one.add_argument("--steps", type=int, default=0, help="of an epoch; all by default")
    one.add_argument("--lr", type=float)
    one.add_argument("--decay", type=float, default=0.0)
    one.add_argument("--slope", default="approx", choices=("approx", "ede", "clipped", "swish"))
    one.add_argument("--real", type=float, default=0.0, help="share of the steps with real weights, w1a1")
    one.add_argument("--shift", type=int, default=4, help="pixels that training images move by at most")
    one.add_argument("--compile", action="store_true")
    one.add_argument("--limit", type=int, default=0, help="stop after so many steps, to look at a setting")
    one.add_argument("--name", default="", help="added to the file's name")
    two = verbs.add_parser("evaluate")
    two.add_argument("files", nargs="+")
    three = verbs.add_parser("ptq")
    three.add_argument(
        "--grids", nargs="+", default=["int4", "pot3", "pot4", "pot5", "apot3", "apot4", "apot5"]
    )
    for sub in (one, two, three):
        sub.add_argument("--threads", type=int, default=2)
        sub.add_argument("--out", default="qat_runs")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    {"train": train, "evaluate": evaluate, "ptq": ptq}[args.verb](args)


if __name__ == "__main__":
    main()

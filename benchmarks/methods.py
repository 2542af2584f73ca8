"""Post-training methods side by side: top-1 of image networks on the engine's integer programs, against float.

usage: python benchmarks/methods.py TABLE ... [--only NETWORK ...] [--methods NAME ...] [--bits W4A8 ...]
                                    [--iterations 500] [--batch 32] [--views 0] [--seed 0] [--limit N] [--json FILE]
                                    [--checkpoint FOLDER] [--ten-crops]

Tables:
    free    without data, one scale for each weight tensor and one for each row: networks with batch norm from an
            example of 32 images alone; MobileNetV2, whose norms are folded away, from 100 unlabelled images; ResNet-20
            also with the channels inside of its blocks rescaled by 2^U(-4, 4), which leaves its function as it is
    int8    W8A8 with a scale for each row
    few     few bits: the first convolution's weights and the classifier at 8 bits, sums at 8 bits
    time    seconds that rounding takes: SQuant, and AdaRound with the given iterations

Networks and data are those of accuracy.py: CIFAR networks calibrate on 512 training images, ImageNet networks on 100;
all test images (10,000, or 500) count. With `--views N` MCUNet also calibrates on N random crops of each of its
images. `--ten-crops` tests MobileNetV2 and SqueezeNet on ten crops of each image, as 500 are few to tell a drop of
some tenths of a point by. With `--checkpoint` what was learned is kept block by block, for a run that was stopped and
for methods that begin alike. `sqnr` is that of the logits in dB. Seeds decide mini-batches and nothing else.
One standard error of a drop is about 100 sqrt((1 - agree) / n) points.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pictures import NETWORKS, Network, mcunet_views, network_of
from torch import Tensor, nn

import pennyweight as pw
from pennyweight.measure import cpu_name
from pennyweight.recipe import Recipe


def step(name: str, **options: Any) -> str:
    """One pass as text."""
    lines = [f"{key} = {value}" for key, value in options.items()]
    return "\n".join(["", "[[passes]]", f'pass = "{name}"', *lines, ""])


def rule(weight: str, activations: str, **match: str) -> str:
    """One rule as text."""
    lines = [f"{key} = {value}" for key, value in match.items()]
    return "\n".join(
        ["", "[[rules]]", f'weight = "{weight}"', f'input = "{activations}"', "optional = true", *lines, ""]
    )


SEARCHED = {"range": '"mse"', "options": "{ steps = 16, shrink = 0.85 }"}
CLIPPED = step("calibrate", range='"percentile"', options="{ p = 0.99999 }")
SQUARED = step("calibrate", range='"mse"')
CORRECTED = step("correct_bias")
MEASURED = step("correct_bias", source='"outputs"')
SMOOTHED = step("smooth", producers='"all"')

Learned = dict[str, int]  # options of what is learned: steps, and samples of each


def _even(alpha: float, ranges: str) -> Callable[[Learned], str]:
    """Smoothed by this much, in these ranges, retargeted."""
    smoothed = step("smooth", producers='"all"', alpha=alpha)
    return lambda learned: smoothed + ranges + step("solve", solver='"gptq"', retarget="true", **SEARCHED)


INT8: dict[str, Callable[[Learned], str]] = {
    "nearest": lambda learned: step("calibrate") + step("solve"),
    "int8": lambda learned: CLIPPED + step("solve", **SEARCHED) + CORRECTED,
    "int8, measured biases": lambda learned: CLIPPED + step("solve", **SEARCHED) + MEASURED,
    "smooth": lambda learned: SMOOTHED + CLIPPED + step("solve", **SEARCHED) + MEASURED,
    "smooth, GPTQ": lambda learned: (
        SMOOTHED + CLIPPED + step("solve", solver='"gptq"', **SEARCHED) + MEASURED
    ),
    "smooth, GPTQ, retargeted": _even(0.5, CLIPPED),
    **{
        f"smooth {alpha}, {name}, GPTQ, retargeted": _even(alpha, ranges)
        for alpha in (0.5, 0.7, 0.8)
        for name, ranges in (("MSE", SQUARED), ("chosen", step("choose_ranges")))
    },
    "smooth, descent, retargeted": lambda learned: (
        SMOOTHED + CLIPPED + step("solve", solver='"descent"', retarget="true", **SEARCHED)
    ),
    "smooth, BRECQ": lambda learned: SMOOTHED + CLIPPED + step("brecq", **learned),
    "smooth, QDrop": lambda learned: SMOOTHED + CLIPPED + step("qdrop", **learned),
}
LEARNED = {"range": '"mse"'}


def _solved(solver: str = "gptq", calibrated: str = CLIPPED, biases: str = MEASURED) -> str:
    """A solver's codes and biases, to learn on from."""
    return calibrated + step("solve", solver=f'"{solver}"', **LEARNED) + biases


def _aimed(solver: str, calibrated: str = CLIPPED) -> str:
    """Retargeted codes; biases come with them."""
    return calibrated + step("solve", solver=f'"{solver}"', retarget="true", **LEARNED)


def _whole(learned: Learned) -> str:
    """Everything at once, by the logits."""
    options = {"start": '"solved"', "units": '"network"', "rounding": '"free"', "steps": "true"}
    return step("reconstruct", **learned, **options)


FEW: dict[str, Callable[[Learned], str]] = {
    "nearest, min-max": lambda learned: step("calibrate") + step("solve"),
    "nearest": lambda learned: SQUARED + step("solve", **LEARNED),
    "bias corrected": lambda learned: SQUARED + step("solve", **LEARNED) + CORRECTED,
    "biases measured": lambda learned: SQUARED + step("solve", **LEARNED) + MEASURED,
    "SQuant": lambda learned: SQUARED + step("solve", solver='"squant"', **LEARNED),
    "GPTQ": lambda learned: _solved("gptq", SQUARED, CORRECTED),
    "GPTQ, biases measured": lambda learned: _solved("gptq", SQUARED),
    "descent": lambda learned: _solved("descent", SQUARED, CORRECTED),
    "descent, biases measured": lambda learned: _solved("descent", SQUARED),
    "GPTQ, retargeted": lambda learned: _aimed("gptq", SQUARED),
    "descent, retargeted": lambda learned: _aimed("descent", SQUARED),
    "AdaRound": lambda learned: SQUARED + step("adaround", **learned),
    "BRECQ": lambda learned: SQUARED + step("brecq", **learned),
    "QDrop": lambda learned: SQUARED + step("qdrop", **learned),
    "AdaQuant": lambda learned: _solved() + step("adaquant", start='"solved"', **learned),
    "AdaQuant, then whole": lambda learned: (
        _solved() + step("adaquant", start='"solved"', **learned) + _whole(learned)
    ),
    "descent, percentiles": lambda learned: _solved("descent"),
    "descent, AdaQuant": lambda learned: _solved("descent") + step("adaquant", start='"solved"', **learned),
    "descent, retargeted, percentiles": lambda learned: _aimed("descent"),
    "descent, retargeted, AdaQuant": lambda learned: (
        _aimed("descent") + step("adaquant", start='"solved"', **learned)
    ),
}


def learned_by(args: argparse.Namespace) -> Learned:
    """As the command line has them."""
    return {"iterations": args.iterations, "batch": args.batch}


BITS = {
    "W4A8": ("int4[1,*]", "uint8[*]+z"), "W4A4": ("int4[1,*]", "uint4[*]+z"), "W3A8": ("int3[1,*]", "uint8[*]+z"),
    "W3A3": ("int3[1,*]", "uint3[*]+z"), "W4A8 per tensor": ("int4n[*]", "uint8[*]+z"),
    "W4A8 zero points": ("int4[1,*]+z", "uint8[*]+z"),
}  # fmt: skip
ENDS = {"resnet20_jpeg": ("conv1", "linear"), "resnet56": ("conv1", "linear"),
        "mcunet": ("first_conv.conv", "classifier"), "mobilenet_v2": ("features.0.0", "classifier"),
        "squeezenet": ("features.0", "classifier")}  # fmt: skip


@dataclass
class Row:
    """One network under one method."""

    network: str
    bits: str
    method: str
    top1: float
    float_top1: float
    drop: float
    agree: float
    sqnr: float
    count: int
    seconds: float


class Bench:
    """A network with its float logits.

    Attributes:
        inputs: the test images as the network takes them.
        checkpoint: folder for what is learned.
    """

    def __init__(self, network: Network, checkpoint: Path | None = None) -> None:
        self.network, self.checkpoint = network, checkpoint
        images, size = network.images, network.batch
        self.inputs = torch.cat([network.prepare(images[i : i + size]) for i in range(0, len(images), size)])
        self.labels = torch.from_numpy(network.labels)
        self.batches = list(network.calibration_batches())
        with torch.no_grad():
            self.logits = torch.cat([network.model(b) for b in self.inputs.split(size)])

    def row(
        self,
        bits: str,
        method: str,
        recipe: str,
        seed: int,
        *,
        model: nn.Module | None = None,
        data: bool = True,
    ) -> Row:
        """Quantize and run the whole test set on the engine."""
        net, start = self.network, time.perf_counter()
        result = pw.quantize(
            net.model if model is None else model, self.batches if data else None, Recipe.parse(recipe),
            example=self.batches[0][:32], seed=seed, progress=False,
            checkpoint=self.checkpoint,
        )  # fmt: skip
        seconds = time.perf_counter() - start
        compiled = pw.compile(result, self.inputs[: net.batch])
        with torch.no_grad():
            y = torch.cat([compiled(b).clone() for b in self.inputs.split(net.batch)])
        top1, float_top1 = (
            100 * float((v.argmax(1) == self.labels).float().mean()) for v in (y, self.logits)
        )
        agree = 100 * float((y.argmax(1) == self.logits.argmax(1)).float().mean())
        noise = (y - self.logits).double().pow(2).sum() / self.logits.double().pow(2).sum()
        sqnr = -10 * float(torch.log10(noise.clamp_min(1e-20)))
        return Row(net.name, bits, method, top1, float_top1, float_top1 - top1, agree, sqnr, len(y), seconds)


def rescaled(model: nn.Module, seed: int) -> nn.Module:
    """A CIFAR ResNet with channel i inside of each block scaled by 2^U(-4, 4) and back: the same function."""
    model, gen = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for block in (b for stage in (model.layer1, model.layer2, model.layer3) for b in stage):  # type: ignore[union-attr]
            s: Tensor = 2 ** (torch.rand(block.bn1.num_features, generator=gen) * 8 - 4)  # type: ignore[union-attr]
            block.bn1.weight *= s  # type: ignore[union-attr]
            block.bn1.bias *= s  # type: ignore[union-attr]
            block.conv2.weight /= s.view(1, -1, 1, 1)  # type: ignore[union-attr]
    return model


def free(bench: Bench, args: argparse.Namespace) -> Iterator[Row]:
    """Rows of the table `free`."""
    name, preset = bench.network.name, Recipe.preset("int8-data-free").to_text()
    tensor = preset.replace('weight = "int8n[1,*]"', 'weight = "int8n[*]"')
    models = {"": bench.network.model}
    if name == "resnet20_jpeg":
        models["rescaled, "] = rescaled(bench.network.model, args.seed)
    for what, model in models.items():
        naive = rule("int8n[*]", "uint8[*]+z") + step("fold_batch_norm") + step("calibrate") + step("solve")
        yield bench.row(
            "W8A8 per tensor", f"{what}nearest, min-max, with data", naive, args.seed, model=model
        )
        if name in ("mobilenet_v2", "squeezenet"):
            even = (
                step("fold_batch_norm") + step("equalize") + CLIPPED + step("solve", **SEARCHED) + CORRECTED
            )
            text = rule("int8n[*]", "uint8[*]+z") + even
            yield bench.row("W8A8 per tensor", "equalized, biases from data", text, args.seed)
            continue
        yield bench.row("W8A8 per tensor", f"{what}data-free", tensor, args.seed, model=model, data=False)
        yield bench.row("W8A8", f"{what}data-free", preset, args.seed, model=model, data=False)


def int8(bench: Bench, args: argparse.Namespace) -> Iterator[Row]:
    """Rows of the table `int8`."""
    head = rule("int8n[1,*]", "uint8[*]+z") + step("fold_batch_norm")
    for method, steps in INT8.items():
        if not args.methods or method in args.methods:
            yield bench.row("W8A8", method, head + steps(learned_by(args)), args.seed)


def few(bench: Bench, args: argparse.Namespace) -> Iterator[Row]:
    """Rows of the table `few`."""
    first, last = ENDS[bench.network.name]
    for bits, (weight, activations) in BITS.items():
        if args.bits and bits not in args.bits:
            continue
        head = "".join(rule("int8n[1,*]", "uint8[*]+z", match=f'"{m}"') for m in (first, last))
        head += rule("int8n[1,*]", "uint8[*]+z", types='["add"]') + rule(weight, activations)
        smooth = SMOOTHED if bench.network.name in ("mcunet", "mobilenet_v2") else ""
        for method, steps in FEW.items():
            if not args.methods or method in args.methods:
                text = head + step("fold_batch_norm") + smooth + steps(learned_by(args))
                yield bench.row(bits, method, text, args.seed)


def timed(bench: Bench, args: argparse.Namespace) -> Iterator[Row]:
    """Rows of the table `time`: seconds of the passes that round alone, without recording and evaluation."""
    head = rule("int4[1,*]", "uint8[*]+z") + step("fold_batch_norm") + step("calibrate")
    for method, last in (
        ("SQuant", step("solve", solver='"squant"')), ("AdaRound", step("adaround", **learned_by(args)))
    ):  # fmt: skip
        seconds = []
        for steps in (step("solve"), last):
            prepared = pw.prepare(bench.network.model, bench.batches[0], Recipe.parse(head + steps))
            start = time.perf_counter()
            pw.calibrate(prepared, bench.batches, progress=False)
            seconds.append(time.perf_counter() - start)
        row = bench.row("W4A8", method, head + last, args.seed)
        yield replace(row, method=f"{method}: {seconds[1] - seconds[0]:.2f} s beyond nearest rounding")


TABLES = {"free": free, "int8": int8, "few": few, "time": timed}
HEAD = ("network", "bits", "method", "top-1", "float", "drop", "agree %", "sqnr", "n", "s")


def cells(r: Row) -> tuple[str, ...]:
    """A row as text."""
    return (r.network, r.bits, r.method, f"{r.top1:.2f}", f"{r.float_top1:.2f}", f"{r.drop:+.2f}",
            f"{r.agree:.2f}", f"{r.sqnr:.1f}", str(r.count), f"{r.seconds:.0f}")  # fmt: skip


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tables", nargs="+", choices=sorted(TABLES))
    parser.add_argument("--only", nargs="+", choices=sorted(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--methods", nargs="+")
    parser.add_argument("--bits", nargs="+", choices=list(BITS))
    parser.add_argument("--iterations", type=int, default=500)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--views", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, help="first images only")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--ten-crops", action="store_true", help="of each test image")
    parser.add_argument("--checkpoint", type=Path, help="folder to keep what is learned in")
    args = parser.parse_args()
    print(f"{cpu_name()}, {torch.get_num_threads()} threads, seed {args.seed}, {args.iterations} iterations")
    print("| " + " | ".join(HEAD) + " |\n|" + "---|" * len(HEAD))
    rows: list[Row] = []
    for name in args.only:
        network = network_of(name, args.limit, ten=args.ten_crops)
        if args.views and name == "mcunet":
            network.views = mcunet_views(network.calibration, args.views, args.seed + 1)
        bench = Bench(network, args.checkpoint)
        for table in args.tables:
            for row in TABLES[table](bench, args):
                rows.append(row)
                print("| " + " | ".join(cells(row)) + " |", flush=True)
                if args.json:
                    args.json.write_text(json.dumps([asdict(r) for r in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Top-1 of image networks after post-training int8, against float, on real images.

usage: python benchmarks/accuracy.py [--only resnet20_jpeg mcunet] [--recipes int8] [--simulated] [--limit N]
                                     [--json FILE]

    resnet20_jpeg   ResNet-20 on the CIFAR-10 JPEG test set, 10,000 images
    resnet56        ResNet-56 (trained on lossless images) on the same
    mobilenet_v2    MobileNetV2 1.0, batch norm already folded, on 500 ImageNet images
    mcunet          MCUNet 320 kB, 176 x 176, on the same 500
    squeezenet      SqueezeNet 1.1, on the same 500

CIFAR networks calibrate on 512 training images, every 97th; ImageNet networks on 100 images of other classes than
the 500. Data and network definitions are read from the folder PENNYWEIGHT_DATA, or ../shared/data beside the
repository. The 500 ImageNet images are most likely training images: good for drops and agreement, never to be quoted
as accuracy.

Recipes: names of presets, and variants of them, written `preset/key=value,...` with the keys
    activations, weights   a range rule, with options: int8/activations=percentile(p=0.9999)
    pertensor              1: one scale for each weight tensor

Columns: `drop` in points; `agree` the share of images with float's class; `error` the mean over layers
of |W - W'| / |W| (Frobenius) in percent. One standard error of a drop is about 100 sqrt((1 - agree) / n) points.
By default the converted model runs, on integer codes; --simulated runs the calibrated model, on fake-quantized floats.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import json
import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pictures import NETWORKS, Network, network_of
from torch import nn

import pennyweight as pw
from pennyweight.passes.calibrate import Calibrate
from pennyweight.passes.solve import Solve, weights
from pennyweight.pipeline import calibrate, convert, prepare
from pennyweight.recipe import Recipe
from pennyweight.spec import QuantSpec


def rule_of(text: str) -> tuple[str, dict[str, Any]]:
    """`percentile(p=0.9999)` to a name and options."""
    match = re.fullmatch(r"(\w+)(?:\((.*)\))?", text)
    if match is None:
        raise SystemExit(f"{text!r} is not a range rule, as in percentile(p=0.9999)")
    options = (part.split("=") for part in (match[2] or "").split(";") if part)
    return match[1], {key.strip(): ast.literal_eval(value) for key, value in options}


def recipe_of(text: str) -> Recipe:
    """A preset, or a variant of one; see the top of the file."""
    name, _, changes = text.partition("/")
    recipe = Recipe.preset(name)
    for change in filter(None, changes.split(",")):
        key, _, value = change.partition("=")
        if key == "pertensor":
            spec = QuantSpec.parse("int8n[*]")
            rules = tuple(
                dataclasses.replace(r, weight=spec) if r.weight is not None and not r.types else r
                for r in recipe.rules
            )
            recipe = dataclasses.replace(recipe, rules=rules)
        elif key in ("activations", "weights"):
            kind = Calibrate if key == "activations" else Solve
            rule, options = rule_of(value)
            steps = tuple(
                dataclasses.replace(s, range=rule, options=options) if isinstance(s, kind) else s
                for s in recipe.passes
            )
            recipe = dataclasses.replace(recipe, passes=steps)
        else:
            raise SystemExit(f"{key!r} is not among activations, weights, pertensor")
    return recipe


@dataclass
class Row:
    """One network under one recipe."""

    network: str
    recipe: str
    top1: float
    float_top1: float
    drop: float
    agree: float
    error: float
    count: int
    seconds: float


def weight_error(calibrated: nn.Module) -> float:
    """Mean over layers of |W - W'| / |W|, in percent."""
    found = []
    for twin, name, matrix in weights(calibrated, dict(calibrated.named_parameters())):
        change = twin.solved[name].dequantize().reshape(matrix.shape) - matrix
        found.append(float(change.norm() / matrix.norm()))
    return 100 * float(np.mean(found))


def quantized(network: Network, recipe: Recipe) -> nn.Module:
    """The calibrated model of a network."""
    example = next(network.calibration_batches())
    prepared = prepare(network.model, example, recipe)
    return calibrate(prepared, network.calibration_batches(), progress=False)


def measure(network: Network, text: str, float_classes: np.ndarray, *, simulated: bool) -> Row:
    """Quantize a network by a recipe and evaluate it."""
    start = time.perf_counter()
    model = quantized(network, recipe_of(text))
    error = weight_error(model)
    classes = network.predictions(model if simulated else convert(model))
    top1, float_top1 = (100 * float((c == network.labels).mean()) for c in (classes, float_classes))
    agree = 100 * float((classes == float_classes).mean())
    seconds = time.perf_counter() - start
    return Row(network.name, text, top1, float_top1, float_top1 - top1, agree, error, len(classes), seconds)


def table(rows: list[Row]) -> str:
    """Aligned text."""
    head = ("network", "recipe", "top-1", "float", "drop", "agree %", "error %", "n", "s")
    cells = [
        (r.network, r.recipe, f"{r.top1:.2f}", f"{r.float_top1:.2f}", f"{r.drop:+.2f}", f"{r.agree:.2f}",
         f"{r.error:.3f}", str(r.count), f"{r.seconds:.0f}")
        for r in rows
    ]  # fmt: skip
    widths = [max(len(row[i]) for row in [head, *cells]) for i in range(len(head))]
    return "\n".join(
        "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in [head, *cells]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=sorted(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--recipes", nargs="+", default=["int8", "int8/pertensor=1"])
    parser.add_argument(
        "--simulated", action="store_true", help="fake-quantized floats instead of integer codes"
    )
    parser.add_argument("--limit", type=int, help="first images only")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    options = parser.parse_args()
    rows = []
    for name in options.only:
        network = network_of(name, options.limit)
        float_classes = network.predictions(network.model)
        for text in options.recipes:
            rows.append(measure(network, text, float_classes, simulated=options.simulated))
            print(table(rows[-1:]).splitlines()[1], flush=True)
    print("\n" + table(rows))
    if options.json:
        meta = {"torch": torch.__version__, "pennyweight": pw.__version__, "simulated": options.simulated}
        options.json.write_text(json.dumps({**meta, "rows": [asdict(r) for r in rows]}, indent=1) + "\n")


if __name__ == "__main__":
    main()

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
import importlib.util
import io
import json
import os
import re
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import pennyweight as pw
from pennyweight.passes.calibrate import Calibrate
from pennyweight.passes.solve import Solve, weights
from pennyweight.pipeline import calibrate, convert, prepare
from pennyweight.recipe import Recipe
from pennyweight.spec import QuantSpec

CIFAR_CALIBRATION, CIFAR_STRIDE = 512, 97


def data_folder() -> Path:
    """The folder of real data.

    Raises:
        SystemExit: if there is none.
    """
    beside = Path(__file__).resolve().parents[1].parent / "shared" / "data"
    folder = Path(os.environ.get("PENNYWEIGHT_DATA", beside))
    if not folder.is_dir():
        raise SystemExit(f"no data in {folder}: set PENNYWEIGHT_DATA")
    return folder


@dataclass
class Network:
    """A float network with its images.

    Attributes:
        model: in eval mode.
        prepare: images uint8 [n, height, width, 3] to the input of the network.
        calibration: images to calibrate on.
        images, labels: to evaluate on.
        batch: images a batch.
    """

    name: str
    model: nn.Module
    prepare: Callable[[np.ndarray], Tensor]
    calibration: np.ndarray
    images: np.ndarray
    labels: np.ndarray
    batch: int

    def calibration_batches(self) -> Iterator[Tensor]:
        """Batches of the calibration images."""
        for i in range(0, len(self.calibration), self.batch):
            yield self.prepare(self.calibration[i : i + self.batch])

    def predictions(self, model: nn.Module) -> np.ndarray:
        """Classes that a model gives the evaluation images, [n]."""
        found = []
        with torch.no_grad():
            for i in range(0, len(self.images), self.batch):
                found.append(model(self.prepare(self.images[i : i + self.batch])).argmax(1).numpy())
        return np.concatenate(found)


def read_images(path: Path, pick: slice = slice(None)) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [n, height, width, 3] and labels [n] of a zip whose file names start with the class index."""
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()[pick]
        files = [np.asarray(Image.open(io.BytesIO(archive.read(n))).convert("RGB")) for n in names]
    return np.stack(files), np.array([int(n.split("_")[0]) for n in names])


def definition(folder: Path, name: str) -> ModuleType:
    """A file of network definitions as a module."""
    spec = importlib.util.spec_from_file_location(f"networks_{name}", folder / "networks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def loaded(model: nn.Module, path: Path) -> nn.Module:
    """The model with its checkpoint, in eval mode."""
    model.load_state_dict(torch.load(path, map_location="cpu"))
    return model.eval()


def cifar(folder: Path, limit: int, name: str, depth: int) -> Network:
    """A residual network on CIFAR-10 as JPEG files."""
    module = definition(folder, "cifar_resnet")
    taken = slice(0, CIFAR_STRIDE * CIFAR_CALIBRATION, CIFAR_STRIDE)
    calibration, _ = read_images(folder / "cifar10" / "train50k_jpeg.zip", taken)
    images, labels = read_images(folder / "cifar10" / "test10k_jpeg.zip", slice(limit))
    model = loaded(module.CifarResNet(depth), folder / "cifar10" / f"{name}.pt")
    return Network(name, model, module.normalize, calibration, images, labels, 250)


def resnet20_jpeg(folder: Path, limit: int = 10_000) -> Network:
    """ResNet-20, fine-tuned on JPEG images."""
    return cifar(folder, limit, "resnet20_jpeg", 20)


def resnet56(folder: Path, limit: int = 10_000) -> Network:
    """ResNet-56, trained on lossless images."""
    return cifar(folder, limit, "resnet56", 56)


def crop(images: np.ndarray) -> Tensor:
    """The middle 224 x 224 of 256 x 256, [n, 3, 224, 224] from 0 to 255."""
    return torch.from_numpy(np.ascontiguousarray(images[:, 16:240, 16:240])).permute(0, 3, 1, 2).float()


def imagenet(
    folder: Path, limit: int, name: str, make: Callable[[ModuleType], nn.Module], file: str,
    inputs: Callable[[np.ndarray], Tensor], offset: int = 0,
) -> Network:  # fmt: skip
    """A network on ImageNet images of 256 x 256."""
    calibration, _ = read_images(folder / "imagenet" / "calibration100_256.zip")
    images, labels = read_images(folder / "imagenet" / "images500_256.zip", slice(limit))
    model = loaded(make(definition(folder, "imagenet_nets")), folder / "imagenet" / file)
    return Network(name, model, inputs, calibration, images, labels + offset, 20)


def mobilenet_v2(folder: Path, limit: int = 500) -> Network:
    """MobileNetV2 1.0 with batch norm folded; its class 0 is the background."""
    return imagenet(
        folder, limit, "mobilenet_v2", lambda m: m.MobileNetV2Slim(), "mobilenet_v2_slim_folded.pt",
        lambda x: crop(x) / 127.5 - 1, offset=1,
    )  # fmt: skip


def mcunet(folder: Path, limit: int = 500) -> Network:
    """MCUNet 320 kB at 176 x 176."""

    def inputs(images: np.ndarray) -> Tensor:
        small = [np.asarray(Image.fromarray(i).resize((201, 201), Image.Resampling.BILINEAR)) for i in images]
        return torch.from_numpy(np.stack(small)[:, 12:188, 12:188]).permute(0, 3, 1, 2).float() / 127.5 - 1

    return imagenet(folder, limit, "mcunet", lambda m: m.MCUNet(), "mcunet_320k_1mb.pt", inputs)


def squeezenet(folder: Path, limit: int = 500) -> Network:
    """SqueezeNet 1.1."""
    mean = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
    return imagenet(
        folder, limit, "squeezenet", lambda m: m.SqueezeNet("1.1"), "squeezenet1_1.pt",
        lambda x: (crop(x) / 255 - mean) / std,
    )  # fmt: skip


NETWORKS: dict[str, Callable[..., Network]] = {
    f.__name__: f for f in (resnet20_jpeg, resnet56, mobilenet_v2, mcunet, squeezenet)
}


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
    folder, rows = data_folder(), []
    for name in options.only:
        network = NETWORKS[name](folder, **({"limit": options.limit} if options.limit else {}))
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

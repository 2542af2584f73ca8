"""Image networks of the shared data with their images: what accuracy is measured on, for ours and for every peer.

Nothing here needs Pennyweight. CIFAR networks calibrate on 512 training images, every 97th; ImageNet networks on 100
images of other classes than the 500 that count.
"""

from __future__ import annotations

import importlib.util
import io
import os
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

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
        views: further inputs to calibrate on, made from the calibration images.
    """

    name: str
    model: nn.Module
    prepare: Callable[[np.ndarray], Tensor]
    calibration: np.ndarray
    images: np.ndarray
    labels: np.ndarray
    batch: int
    views: Tensor | None = None

    def calibration_batches(self) -> Iterator[Tensor]:
        """Batches of the calibration images."""
        for i in range(0, len(self.calibration), self.batch):
            yield self.prepare(self.calibration[i : i + self.batch])
        if self.views is not None:
            yield from self.views.split(self.batch)

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


def cifar(folder: Path, limit: int, name: str, depth: int, draw: int = 0) -> Network:
    """A residual network on CIFAR-10 as JPEG files, calibrated on every 97th training image from number `draw` on."""
    module = definition(folder, "cifar_resnet")
    taken = slice(draw, draw + CIFAR_STRIDE * CIFAR_CALIBRATION, CIFAR_STRIDE)
    calibration, _ = read_images(folder / "cifar10" / "train50k_jpeg.zip", taken)
    images, labels = read_images(folder / "cifar10" / "test10k_jpeg.zip", slice(limit))
    model = loaded(module.CifarResNet(depth), folder / "cifar10" / f"{name}.pt")
    return Network(name, model, module.normalize, calibration, images, labels, 250)


def resnet20_jpeg(folder: Path, limit: int = 10_000, draw: int = 0) -> Network:
    """ResNet-20, fine-tuned on JPEG images."""
    return cifar(folder, limit, "resnet20_jpeg", 20, draw)


def resnet56(folder: Path, limit: int = 10_000, draw: int = 0) -> Network:
    """ResNet-56, trained on lossless images."""
    return cifar(folder, limit, "resnet56", 56, draw)


def crop(images: np.ndarray) -> Tensor:
    """The middle 224 x 224 of 256 x 256, [n, 3, 224, 224] from 0 to 255."""
    return torch.from_numpy(np.ascontiguousarray(images[:, 16:240, 16:240])).permute(0, 3, 1, 2).float()


def ten_crops(images: np.ndarray) -> np.ndarray:
    """Middle and corners of each image, mirrored too, where `crop` cuts: [n, 256, 256, 3] to [10 * n, 256, 256, 3]."""
    found = []
    for y, x in ((16, 16), (0, 0), (0, 32), (32, 0), (32, 32)):
        moved = np.zeros_like(images)
        moved[:, 16:240, 16:240] = images[:, y : y + 224, x : x + 224]
        found += [moved, moved[:, :, ::-1]]
    return np.concatenate(found)


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


def mcunet_views(images: np.ndarray, count: int, seed: int) -> Tensor:
    """Random views for MCUNet: scaled to 184 up to 225 pixels, cut to 176, every other one mirrored by chance.

    images: uint8 [n, height, width, 3]; result [count * n, 3, 176, 176].
    """
    size, rng, found = 176, np.random.default_rng(seed), []
    for image in np.concatenate([images] * count):
        wide = int(rng.integers(184, 226))
        small = np.asarray(Image.fromarray(image).resize((wide, wide), Image.Resampling.BILINEAR))
        y, x = rng.integers(0, wide - size + 1, 2)
        view = small[y : y + size, x : x + size]
        found.append(view[:, ::-1] if rng.random() < 0.5 else view)
    return torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2).float() / 127.5 - 1


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
CROPPED = ("mobilenet_v2", "squeezenet")  # what `crop` cuts


def network_of(name: str, limit: int | None = None, draw: int = 0, ten: bool = False) -> Network:
    """A network by its name, tested on the first `limit` images, or with `ten` on ten crops of each where it can be.

    `draw`: which calibration images, of CIFAR networks.
    """
    chosen = {key: value for key, value in (("limit", limit), ("draw", draw)) if value}
    network = NETWORKS[name](data_folder(), **chosen)
    if ten and name in CROPPED:
        network.images, network.labels = ten_crops(network.images), np.tile(network.labels, 10)
    return network

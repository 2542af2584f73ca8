"""The images that the package carries: test and calibration images of Fashion-MNIST, and the trained weights."""

from __future__ import annotations

import lzma
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

TEST, CALIBRATION, SIDE = 10_000, 512, 28


class Images(NamedTuple):
    """test uint8 [10000, 28, 28], labels uint8 [10000], calibration uint8 [512, 28, 28] (of the training set)."""

    test: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.uint8]
    calibration: npt.NDArray[np.uint8]


def images() -> Images:
    """Unpack the embedded images.

    Source: Fashion-MNIST (Xiao et al. 2017, arXiv:1708.07747), MIT licence.
    """
    raw = lzma.decompress((resources.files("pennyweight.demo") / "assets" / "images.xz").read_bytes())
    data = np.frombuffer(raw, np.uint8)
    pixels = SIDE * SIDE
    test, labels, calibration = np.split(data, [TEST * pixels, TEST * (pixels + 1)])
    return Images(test.reshape(TEST, SIDE, SIDE), labels, calibration.reshape(CALIBRATION, SIDE, SIDE))


def weights_path() -> Path:
    """The float32 weights, a safetensors file."""
    return Path(str(resources.files("pennyweight.demo") / "assets" / "weights.safetensors"))


def normalized(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """uint8 [N, 28, 28] -> float32 [N, 1, 28, 28], as `network.normalize` does, without torch."""
    return ((pixels.astype(np.float32) / np.float32(255) - np.float32(0.2860)) / np.float32(0.3530))[:, None]

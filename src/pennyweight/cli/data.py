"""What DATA may be on the command line: `.npy`, `.npz`, a folder of images, or `package.module:function`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pennyweight.cli.models import call_reference
from pennyweight.errors import EmptyCalibration, InputError
from pennyweight.runtime.arrays import load_arrays

IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".gif", ".tif", ".tiff")
FORMS = "DATA is a .npy or .npz file, a folder of images, or package.module:function."


@dataclass(frozen=True)
class ImageOptions:
    """How images become tensors.

    Args:
        size: side of the square that is cut from the middle; 0 keeps images as they are.
        resize: the shorter side is brought to this first; `size` if 0.
        mean: of each channel, on the scale 0 .. 1; its length, 1 or 3, says grey or colour.
        std: likewise.
        gray: one channel.
    """

    size: int = 0
    resize: int = 0
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    gray: bool = False


def load_data(reference: str, batch: int, limit: int, options: ImageOptions) -> Callable[[], Iterator[Any]]:
    """A function that gives a fresh iterator over batches.

    Args:
        reference: see the module.
        batch: samples a batch; batches that a function gives are left as they are.
        limit: samples at most; 0 for all.
        options: for images.

    Raises:
        InputError: if the reference is none of the forms, or the file holds what cannot be batched.
        EmptyCalibration: if there is nothing in it.
    """
    path = Path(reference)
    if path.suffix in (".npy", ".npz"):
        return _arrays(path, batch, limit)
    if path.is_dir():
        return _images(path, batch, limit, options)
    found = call_reference(reference)
    if isinstance(found, torch.Tensor | np.ndarray | str | bytes) or not hasattr(found, "__iter__"):
        raise InputError(
            f"it gives a {type(found).__name__}, not an iterable of batches", site=reference, hint=FORMS
        )
    kept = found if isinstance(found, list | tuple) or hasattr(found, "__len__") else list(found)
    return lambda: _limited(iter(kept), limit)


def _limited(batches: Iterator[Any], limit: int) -> Iterator[Any]:
    seen = 0
    for batch in batches:
        yield batch
        leaves = torch.utils._pytree.tree_leaves(batch)
        seen += next((len(x) for x in leaves if isinstance(x, torch.Tensor) and x.ndim), 1)
        if limit and seen >= limit:
            return


def as_tensor(array: np.ndarray[Any, Any], where: str) -> torch.Tensor:
    """An array as a model wants it: float64 becomes float32, small integers int64; uint8 and bool stay.

    Raises:
        InputError: if it holds objects or text.
    """
    if array.dtype.kind == "f":
        return torch.from_numpy(array.astype(np.float32))
    if array.dtype == np.uint8 or array.dtype == np.bool_:
        return torch.from_numpy(np.array(array))
    if array.dtype.kind in "iu":
        return torch.from_numpy(array.astype(np.int64))
    raise InputError(f"arrays of {array.dtype} are no model inputs", site=where)


def _arrays(path: Path, batch: int, limit: int) -> Callable[[], Iterator[Any]]:
    arrays = load_arrays(path)
    lengths = {len(a) if a.ndim else 0 for a in arrays.values()}
    if len(lengths) != 1:
        raise InputError(
            "the arrays have different numbers of samples",
            site=str(path),
            shapes=", ".join(f"{n} {a.shape}" for n, a in arrays.items()),
        )
    count = min(lengths.pop(), limit or 1 << 62)
    if not count:
        raise EmptyCalibration("there is no sample in it", site=str(path))

    def batches() -> Iterator[Any]:
        for start in range(0, count, batch):
            stop = min(start + batch, count)
            tensors = {n: as_tensor(a[start:stop], str(path)) for n, a in arrays.items()}
            yield next(iter(tensors.values())) if len(tensors) == 1 else tensors

    return batches


def _images(path: Path, batch: int, limit: int, options: ImageOptions) -> Callable[[], Iterator[Any]]:
    files = sorted(f for f in path.rglob("*") if f.suffix.lower() in IMAGES)
    if limit and len(files) > limit:  # spread over the folder: it may be sorted by class
        files = [files[i * len(files) // limit] for i in range(limit)]
    if not files:
        raise EmptyCalibration(
            "there is no image in the folder", site=str(path), hint=f"Suffixes: {', '.join(IMAGES)}."
        )

    def batches() -> Iterator[Any]:
        for start in range(0, len(files), batch):
            group = [read_image(f, options) for f in files[start : start + batch]]
            shapes = {tuple(t.shape) for t in group}
            if len(shapes) > 1:
                raise InputError(
                    "the images have different sizes",
                    site=str(path),
                    shapes=str(sorted(shapes)[:3]),
                    hint="Give --size.",
                )
            yield torch.stack(group)

    return batches


def read_image(path: Path, options: ImageOptions) -> torch.Tensor:
    """One image as float32 [C, H, W]: `(x / 255 - mean) / std`, bilinear, cut from the middle.

    Raises:
        InputError: if the file is no image, or mean and std do not fit the channels.
    """
    from PIL import Image, UnidentifiedImageError

    gray = options.gray or len(options.mean) == 1
    try:
        with Image.open(path) as file:
            image = file.convert("L" if gray else "RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise InputError(f"this is no image: {error}", site=str(path)) from error
    if options.size:
        side = options.resize or options.size
        width, height = image.size
        scale = side / min(width, height)
        image = image.resize(
            (max(side, round(width * scale)), max(side, round(height * scale))), Image.Resampling.BILINEAR
        )
        left, top = (image.size[0] - options.size) // 2, (image.size[1] - options.size) // 2
        image = image.crop((left, top, left + options.size, top + options.size))
    x = torch.from_numpy(np.array(image, dtype=np.float32) / np.float32(255))
    x = x[None] if gray else x.permute(2, 0, 1)
    for name, values in (("mean", options.mean), ("std", options.std)):
        if len(values) not in (0, 1, len(x)):
            raise InputError(f"--{name} has {len(values)} numbers for {len(x)} channels")
    if options.mean:
        x = x - torch.tensor(options.mean).view(-1, 1, 1)
    if options.std:
        x = x / torch.tensor(options.std).view(-1, 1, 1)
    return x.contiguous()

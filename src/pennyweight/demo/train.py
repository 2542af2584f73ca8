"""Train the demonstration network and write the files that the package embeds.

usage: python -m pennyweight.demo.train FASHION_MNIST_FOLDER OUT_FOLDER [--epochs N]

FASHION_MNIST_FOLDER holds the four IDX files (`train-images-idx3-ubyte.gz`, ...). Writes `weights.safetensors`
(float32) and `images.npz` (512 calibration images of the training set, the 10,000 test images with labels).
Horizontal flips and shifts by up to two pixels; SGD with Nesterov momentum under a one-cycle schedule.
"""

from __future__ import annotations

import argparse
import gzip
import lzma
import pathlib
import time

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from pennyweight.demo.network import FashionNet, normalize

SEED = 20261120


def read_idx(path: pathlib.Path) -> npt.NDArray[np.uint8]:
    """Read an IDX file of unsigned bytes (the format of MNIST and its kin)."""
    raw = gzip.decompress(path.read_bytes())
    ndim = raw[3]
    shape = [int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(ndim)]
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * ndim).reshape(shape)


def augment(x: Tensor, generator: torch.Generator) -> Tensor:
    """Flip left-right with probability one half and shift by -2..2 pixels, image by image."""
    n, _, h, w = x.shape
    flip = torch.rand(n, generator=generator) < 0.5
    x = torch.where(flip[:, None, None, None], x.flip(-1), x)
    padded = F.pad(x, (2, 2, 2, 2), value=float(x.min()))
    dy, dx = torch.randint(0, 5, (2, n), generator=generator)
    rows = (dy[:, None] + torch.arange(h))[:, :, None]  # [n, h, 1]
    cols = (dx[:, None] + torch.arange(w))[:, None, :]  # [n, 1, w]
    return padded[torch.arange(n)[:, None, None], 0, rows, cols].unsqueeze(1)


def accuracy(model: torch.nn.Module, x: Tensor, y: Tensor) -> float:
    """Top-1 accuracy in percent."""
    model.eval()
    with torch.no_grad():
        hits = sum(
            int((model(normalize(x[i : i + 500])).argmax(1) == y[i : i + 500]).sum())
            for i in range(0, len(x), 500)
        )
    return 100 * hits / len(x)


def train(model: FashionNet, x: Tensor, y: Tensor, epochs: int, batch: int = 128) -> None:
    """Fit `model` in place. x: uint8 [N, 28, 28]; y: int64 [N]."""
    generator = torch.Generator().manual_seed(SEED)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    steps = len(x) // batch
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=epochs * steps)
    for epoch in range(epochs):
        model.train()
        start, total = time.time(), 0.0
        for index in torch.randperm(len(x), generator=generator)[: steps * batch].view(-1, batch):
            images = augment(normalize(x[index]), generator).contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(images)
            loss = F.cross_entropy(logits.float(), y[index], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        print(f"epoch {epoch + 1}/{epochs} loss {total / steps:.4f} {time.time() - start:.0f} s", flush=True)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=pathlib.Path)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--epochs", type=int, default=20)
    args = parser.parse_args()
    torch.manual_seed(SEED)
    train_x = torch.from_numpy(read_idx(args.data / "train-images-idx3-ubyte.gz").copy())
    train_y = torch.from_numpy(read_idx(args.data / "train-labels-idx1-ubyte.gz").astype(np.int64))
    test_x = torch.from_numpy(read_idx(args.data / "t10k-images-idx3-ubyte.gz").copy())
    test_y = torch.from_numpy(read_idx(args.data / "t10k-labels-idx1-ubyte.gz").astype(np.int64))
    model = FashionNet().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    train(model, train_x, train_y, args.epochs)
    print(f"test top-1 {accuracy(model, test_x, test_y):.2f} % on {len(test_x)} images")
    args.out.mkdir(parents=True, exist_ok=True)
    state = {
        k: v.contiguous() for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")
    }
    save_file(state, args.out / "weights.safetensors", {"seed": str(SEED), "epochs": str(args.epochs)})
    calibration = train_x[:: len(train_x) // 512][:512]
    arrays = (test_x.numpy(), test_y.numpy().astype(np.uint8), calibration.numpy())
    payload = b"".join(np.ascontiguousarray(a).tobytes() for a in arrays)
    packed = lzma.compress(payload, preset=9 | lzma.PRESET_EXTREME)
    (args.out / "images.xz").write_bytes(packed)
    print(f"wrote {args.out}: images {len(packed) / 1e6:.2f} MB")


if __name__ == "__main__":
    main()

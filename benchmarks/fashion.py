"""The eager listing of examples/migration on real Fashion-MNIST: accuracy of its integer program, and bytes.

usage: python benchmarks/fashion.py [--epochs 6 3] [--out FOLDER]

Trains the network in float, then with quantization, as the listing does (seed 0); converts it, saves it as .dwt, and
runs that file on the engine over the 10,000 test images. Bytes are those of the float state dict and of the file.
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

import torch
from pictures import data_folder

import pennyweight as pw

LISTING = Path(__file__).resolve().parents[1] / "examples" / "migration" / "eager_cnn.py"


def main() -> None:
    """Train, convert, save, run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, nargs=2, default=(6, 3))
    parser.add_argument("--out", type=Path, default=Path("qat_runs"))
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    spec = importlib.util.spec_from_file_location("eager_cnn", LISTING)
    assert spec is not None
    assert spec.loader is not None
    listing = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(listing)
    folder = data_folder() / "fashion_mnist"
    epochs = [str(n) for n in args.epochs]
    converted, test_x, figures = listing.main(
        ["--data", str(folder), "--epochs", *epochs, "--out", str(args.out)]
    )
    path = args.out / "fashion.dwt"
    pw.save(converted, path, example=test_x[:64])
    session = pw.load(path)
    _, labels = listing.images(folder, "t10k")
    right = sum(
        int((torch.from_numpy(session(x.numpy())).argmax(1) == y).sum())
        for x, y in zip(test_x.split(250), labels.split(250), strict=True)
    )
    before, after = (args.out / "float.pt").stat().st_size, path.stat().st_size
    print(", ".join(f"{name} {value:.2f}" for name, value in figures.items()), flush=True)
    print(f"engine {100 * right / len(labels):.2f}; {before} -> {after} bytes, {before / after:.2f}x smaller")


if __name__ == "__main__":
    main()

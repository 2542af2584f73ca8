"""A network at few bits that learns from its float self, on unlabelled images alone.

usage: python benchmarks/taught.py --network mcunet [--bits W4A8] [--steps 600] [--lr 2e-4] [--batch 32] [--seed 0]

The 100 calibration images (none of the classes tested on), cut, resized and flipped at random, are all there is to
learn from: no label. Batch norms are folded away, ranges calibrated on the images as they are (least squares); then
weights, biases and the steps of all grids (LSQ) learn, Adam on a cosine, the divergence from the float network being
the loss (T = 1). First convolution, classifier and sums have 8 bits. Then the integer program sees all 500 test images.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from accuracy import NETWORKS, data_folder
from methods import BITS, ENDS, LEARNED, SMOOTHED, Bench, cells, rule, step
from PIL import Image
from torch import Tensor

import pennyweight as pw
from pennyweight import training
from pennyweight.passes.train import Train
from pennyweight.recipe import Recipe


def views(
    images: np.ndarray, prepare: Any, batch: int, steps: int, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of random cuts of the images, [n, 256, 256, 3], as the network takes them."""
    draw = np.random.default_rng(seed)
    size = images.shape[1]
    for _ in range(steps):
        cut = []
        for i in draw.choice(len(images), batch):
            side = int(size * np.sqrt(draw.uniform(0.25, 1.0)))
            tall = min(size, int(side * np.exp(draw.uniform(-0.25, 0.25))))
            y, x = (int(draw.integers(0, size - s + 1)) for s in (tall, side))
            part = images[i, y : y + tall, x : x + side]
            part = part[:, ::-1] if draw.random() < 0.5 else part
            image = Image.fromarray(np.ascontiguousarray(part))
            cut.append(np.asarray(image.resize((size, size), Image.Resampling.BILINEAR)))
        x = prepare(np.stack(cut)).to(memory_format=torch.channels_last)
        yield x, x


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", choices=sorted(NETWORKS), default="mcunet")
    parser.add_argument("--bits", choices=sorted(BITS), default="W4A8")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    bench = Bench(NETWORKS[args.network](data_folder()))
    net, (weight, activations) = bench.network, BITS[args.bits]
    head = "".join(rule("int8n[1,*]", "uint8[*]+z", match=f'"{m}"') for m in ENDS[args.network])
    head += rule("int8n[1,*]", "uint8[*]+z", types='["add"]') + rule(weight, activations)
    smooth = SMOOTHED if args.network in ("mcunet", "mobilenet_v2") else ""
    text = (
        head + step("fold_batch_norm") + smooth + step("calibrate", range='"mse"') + step("solve", **LEARNED)
    )
    recipe = Recipe.parse(text)
    passes = [*recipe.passes]
    at = next(i for i, p in enumerate(passes) if type(p).__name__ == "Calibrate")
    recipe = Recipe("taught", recipe.rules, (*passes[:at], Train("lsq", "lsq"), *passes[at:]))
    start = time.perf_counter()
    model = training.prepare(net.model, bench.batches[0], recipe)
    pw.calibrate(model, bench.batches, progress=False)
    model = model.to(memory_format=torch.channels_last)
    groups = training.parameter_groups(model, args.lr, 0.0, quantizer_lr=args.lr)
    losses = []

    def nothing(output: Tensor, target: Tensor) -> Tensor:
        losses.append(time.perf_counter())
        if len(losses) % 50 == 0:
            print(f"  step {len(losses)}, {losses[-1] - start:.0f} s", flush=True)
        return output.sum() * 0

    done = training.fit(
        model, lambda: views(net.calibration, net.prepare, args.batch, args.steps, args.seed),
        steps_per_epoch=args.steps, loss=nothing, teacher=net.model.to(memory_format=torch.channels_last),
        optimizer=torch.optim.Adam(groups, args.lr), schedule=training.Schedule(freeze_batch_norm=0), reestimate=0,
        amp=True, progress=False,
    )  # fmt: skip
    seconds = time.perf_counter() - start
    compiled = pw.compile(pw.convert(model), bench.inputs[: net.batch])
    with torch.no_grad():
        y = torch.cat([compiled(b).clone() for b in bench.inputs.split(net.batch)])
    row = bench.judged(y, args.bits, f"taught, {args.steps} steps", seconds)
    print(f"loss {done.losses}", " | ".join(cells(row)), flush=True)


if __name__ == "__main__":
    main()

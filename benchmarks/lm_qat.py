"""Perplexity of small language models in float, quantized after training, and trained with quantization.

usage: python benchmarks/lm_qat.py make --out FOLDER [--steps 800]
       python benchmarks/lm_qat.py run {bytes,stories} --out FOLDER [--weight "int4[32]"] [--method lsq] [--steps 200]
       python benchmarks/lm_qat.py step --out FOLDER [--threads 2]

    bytes     a Llama of bytes, 256 wide, 4 layers, 3.1 M weights, which `make` trains (seed 0) on the validation text
              of WikiText-2 and the first 90 % of tinyshakespeare; tested on the last 10 %, windows of 256 bytes
    stories   stories260K; trained on the first 67,000 tokens of the TinyStories excerpt, tested on the last 30,000

Inputs of linear layers int8, ranged per token at run time; weights as --weight says where the groups fit, one scale
per row elsewhere; tables int8. `run` prints float, float trained on for as many steps, after-training (min-max and
mean-square ranges) and quantization-aware perplexity, on fake-quantized floats and, converted, on integer codes
(--integer). AdamW, cosine to 0; the loss is cross entropy plus the divergence from the float model (T = 1). Seed 0.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import gzip
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pictures import data_folder, definition
from qat import print_ratios
from torch import Tensor, nn

import pennyweight as pw
from pennyweight import training
from pennyweight.recipe import Recipe
from pennyweight.spec import QuantSpec

WINDOW, BATCH = 256, 16


def bytes_of(text: bytes) -> Tensor:
    """Text as ids 0 .. 255."""
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


def texts(name: str) -> tuple[Tensor, Tensor]:
    """Training and test ids."""
    folder = data_folder() / "lm"
    if name == "bytes":
        play = (folder / "tinyshakespeare.txt").read_bytes()
        cut = len(play) * 9 // 10
        wiki = gzip.decompress((folder / "wikitext2_valid.txt.gz").read_bytes())
        return bytes_of(wiki + play[:cut]), bytes_of(play[cut:])
    tokenizer = definition(data_folder(), "tiny_llama").Tokenizer(folder / "tok512.bin", 512)
    ids: list[int] = []
    for story in (folder / "tinystories_sample.txt").read_text("utf8").split("<|endoftext|>"):
        for i, line in enumerate(story.strip().split("\n")):
            ids += tokenizer.encode(line, bos=i == 0)
    return torch.tensor(ids[:-30_000]), torch.tensor(ids[-30_000:])


def network(name: str, folder: Path) -> nn.Module:
    """The float model."""
    module = definition(data_folder(), "tiny_llama")
    if name == "stories":
        model: nn.Module = module.load_bin(data_folder() / "lm" / "stories260K.bin")[0]
        return model
    torch.manual_seed(0)
    model = module.TinyLlama(d=256, hid=704, n=4, h=8, kv=4, vocab=256)
    saved = folder / "bytes.pt"
    if saved.exists():
        model.load_state_dict(torch.load(saved, weights_only=True))
    else:
        for parameter in model.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02)
    return model.eval()


def batches(ids: Tensor, steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Random windows: (ids, next ids), both [BATCH, WINDOW]."""
    made = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        starts = torch.randint(len(ids) - WINDOW - 1, (BATCH,), generator=made).tolist()
        rows = torch.stack([ids[s : s + WINDOW + 1] for s in starts])
        yield rows[:, :-1], rows[:, 1:]


def perplexity(model: nn.Module, ids: Tensor) -> float:
    """`exp` of the mean cross entropy over consecutive windows."""
    model.eval()
    count = (len(ids) - 1) // WINDOW
    x, y = ids[: count * WINDOW].view(count, WINDOW), ids[1 : count * WINDOW + 1].view(count, WINDOW)
    total = 0.0
    with torch.no_grad():
        for a, b in zip(x.split(16), y.split(16), strict=True):
            total += float(F.cross_entropy(model(a).flatten(0, 1), b.flatten(), reduction="sum"))
    return math.exp(total / y.numel())


def next_token(output: Tensor, target: Tensor) -> Tensor:
    """Cross entropy over all positions."""
    return F.cross_entropy(output.flatten(0, 1), target.flatten())


def learn(model: nn.Module, ids: Tensor, steps: int, lr: float, teacher: nn.Module | None) -> None:
    """AdamW; the text, and where there is a teacher its predictions."""
    groups = training.parameter_groups(model, lr, 0.01, quantizer_lr=lr)
    training.fit(
        model, lambda: batches(ids, steps, 1), steps_per_epoch=steps, loss=next_token, teacher=teacher, amp=True,
        optimizer=torch.optim.AdamW(groups, lr, (0.9, 0.95)), reestimate=0, schedule=training.Schedule(), lr=lr,
    )  # fmt: skip


def recipe(weight: str, ranges: str) -> Recipe:
    """int8-dynamic-int4 with other weights or ranges."""
    base = Recipe.preset("int8-dynamic-int4")
    row = QuantSpec(QuantSpec.parse(weight).grid, (1, None))
    rules = tuple(
        dataclasses.replace(r, weight=QuantSpec.parse(weight) if r.fitting else row) if r.input else r
        for r in base.rules
    )
    passes = tuple(dataclasses.replace(p, range=ranges) if hasattr(p, "solver") else p for p in base.passes)
    return dataclasses.replace(base, rules=rules, passes=passes)


def run(args: argparse.Namespace) -> None:
    """One row of the table."""
    folder = Path(args.out)
    train_ids, test_ids = texts(args.name)
    model = network(args.name, folder)
    base = perplexity(model, test_ids)
    after = {}
    for ranges in ("minmax", "mse"):
        prepared = training.prepare(model, None, recipe(args.weight, ranges), weight="lsq", input="clipped")
        after[ranges] = perplexity(pw.calibrate(prepared, []), test_ids)
    more = copy.deepcopy(model)
    learn(more, train_ids, args.steps, args.lr, model)
    tuned = perplexity(more, test_ids)
    student = copy.deepcopy(model)
    prepared = training.prepare(
        student, None, recipe(args.weight, "mse"), weight=args.method, input="clipped"
    )
    pw.calibrate(prepared, [])
    learn(prepared, train_ids, args.steps, args.lr, model)
    aware = perplexity(prepared, test_ids)
    best = min(after.values())
    lost, stricter = 100 * (best - aware) / (best - base), 100 * (best - aware) / (best - tuned)
    print(
        f"{args.name} {args.weight} {args.method} lr {args.lr} {args.steps} steps: float {base:.3f}, trained on "
        f"{tuned:.3f}, after-training minmax {after['minmax']:.3f} mse {after['mse']:.3f}, aware {aware:.3f}; "
        f"recovers {lost:.0f} % of the loss against float, {stricter:.0f} % against float trained on",
        flush=True,
    )
    if args.integer:
        print(f"  on integer codes {perplexity(pw.convert(prepared), test_ids):.3f}", flush=True)


def make(args: argparse.Namespace) -> None:
    """Train the language model of bytes."""
    folder = Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    train_ids, test_ids = texts("bytes")
    (folder / "bytes.pt").unlink(missing_ok=True)
    model = network("bytes", folder)
    start = time.perf_counter()
    learn(model, train_ids, args.steps, 1e-3, None)
    torch.save(model.state_dict(), folder / "bytes.pt")
    print(
        f"bytes: perplexity {perplexity(model, test_ids):.3f}, {time.perf_counter() - start:.0f} s",
        flush=True,
    )


def step(args: argparse.Namespace) -> None:
    """A training step against the float step, interleaved pairs."""
    train_ids, _ = texts("bytes")
    x, y = next(batches(train_ids, 1, 1))
    models: dict[str, Any] = {"float": network("bytes", Path(args.out))}
    for method in ("clipped", "lsq"):
        prepared = training.prepare(network("bytes", Path(args.out)), None, recipe(args.weight, "mse"),
                                    weight=method, input="clipped")  # fmt: skip
        models[method] = pw.calibrate(prepared, [])
    makers = {n: torch.optim.AdamW(m.train().parameters(), 1e-4) for n, m in models.items()}

    def one(name: str) -> Callable[[], None]:
        def run() -> None:
            value = next_token(models[name](x), y)
            makers[name].zero_grad()
            value.backward()
            makers[name].step()

        return run

    print_ratios({name: one(name) for name in models}, args.rounds)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb in ("make", "run", "step"):
        sub = verbs.add_parser(verb)
        sub.add_argument("--out", default="qat_runs")
        sub.add_argument("--threads", type=int, default=2)
        sub.add_argument("--weight", default="int4[32]")
        sub.add_argument("--steps", type=int, default=800 if verb == "make" else 200)
        if verb == "run":
            sub.add_argument("name", choices=["bytes", "stories"])
            sub.add_argument("--method", default="lsq")
            sub.add_argument("--lr", type=float, default=3e-4)
            sub.add_argument("--integer", action="store_true")
        sub.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    {"make": make, "run": run, "step": step}[args.verb](args)


if __name__ == "__main__":
    main()

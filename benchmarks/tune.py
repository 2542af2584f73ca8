"""Formats chosen layer by layer, and searches for a goal, on real networks.

usage: python benchmarks/tune.py mixed [--limit N] [--draws 5] [--seed 0]
       python benchmarks/tune.py goal [--only resnet56 mobilenet_v2 minilm] [--drop 0.5] [--budget "10 min"]

    mixed   ResNet-20 on CIFAR-10 JPEG: weights of 2, 4 or 8 bits, 4 on average over all of them, activations of 8.
            Chosen by an exact solver over damages at the output (one layer at a time, 64 calibration images, no
            labels), against uniform 4 bits and random assignments of the same size. Round to nearest with searched
            scales and corrected biases for all of them.
    goal    `pw.tune` with `Goal(max_drop=...)`: rungs climbed, seconds, the result's score on the whole test set, and
            its speed in turns with int8 whose first and last layers stay in float. `cpu_seconds` is the processor time
            of the search: on a machine that others use too, it says what `seconds` cannot.

Data: see accuracy.py and encoders.py. One JSON object a line on standard output.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import encoders
import numpy as np
import pictures
import torch
from safetensors.torch import load_file
from torch import nn

import pennyweight as pw
from pennyweight.recipe import Recipe
from pennyweight.tune.allocate import Choice, solve
from pennyweight.tune.costs import mixed as mixed_recipe
from pennyweight.tune.costs import run_ns, single
from pennyweight.tune.probe import Probe
from pennyweight.tune.sensitivities import Sensitivity, measure_on

BITS = {"int2": 2, "int4": 4, "int8": 8}
Evaluate = Callable[[nn.Module], float]


def mixed(limit: int, draws: int, seed: int) -> None:
    """The table of `mixed`."""
    network = pictures.resnet20_jpeg(pictures.data_folder(), limit)
    batches, base = list(network.calibration_batches()), Recipe.preset("int8")
    start = time.perf_counter()
    probe = Probe(network.model, batches, tuple(BITS), base, seed=seed)
    known = measure_on(probe, Sensitivity(), ("weights",), seed=seed)
    sizes = {n: sum(m.numel() for m in probe.matrices[n].values()) for n in probe.layers}
    total = sum(sizes.values())
    options = [
        [Choice(f, known.damage(n, f, "weights"), {"bits": sizes[n] * b}) for f, b in BITS.items()]
        for n in probe.layers
    ]
    picked = solve(options, minimize="damage", limits={"bits": 4 * total})
    assert picked is not None
    searched = time.perf_counter() - start
    chosen = {n: options[i][c].form for i, (n, c) in enumerate(zip(probe.layers, picked, strict=True))}
    generator = np.random.default_rng(seed)

    def bits(assignment: dict[str, str]) -> float:
        return sum(sizes[n] * BITS[f] for n, f in assignment.items()) / total

    def drawn() -> dict[str, str]:
        while True:
            found = {n: str(generator.choice(list(BITS))) for n in probe.layers}
            if abs(bits(found) - 4) <= 0.05:
                return found

    def top1(assignment: dict[str, str]) -> float:
        model = pw.quantize(
            network.model, batches, mixed_recipe(base, probe, assignment), seed=seed, progress=False
        )
        runs = pw.compile(model, batches[0])
        return 100 * float((network.predictions(runs) == network.labels).mean())

    float_top1 = 100 * float((network.predictions(network.model) == network.labels).mean())
    print(json.dumps({"float": float_top1, "images": len(network.labels), "search_s": searched}), flush=True)
    print(
        json.dumps({"what": "chosen", "bits": bits(chosen), "top1": top1(chosen), "formats": chosen}),
        flush=True,
    )
    uniform = dict.fromkeys(probe.layers, "int4")
    print(json.dumps({"what": "uniform", "bits": 4.0, "top1": top1(uniform)}), flush=True)
    found = []
    for i in range(draws):
        assignment = drawn()
        found.append(top1(assignment))
        print(json.dumps({"what": f"random {i}", "bits": bits(assignment), "top1": found[-1]}), flush=True)
    print(json.dumps({"what": "random, mean", "top1": float(np.mean(found))}), flush=True)


def images(name: str) -> tuple[nn.Module, list[Any], Evaluate]:
    """A network of accuracy.py with its calibration batches and its top-1 in percent."""
    network = pictures.NETWORKS[name](pictures.data_folder())

    def evaluate(model: nn.Module) -> float:
        return 100 * float((network.predictions(model) == network.labels).mean())

    return network.model, list(network.calibration_batches()), evaluate


def minilm() -> tuple[nn.Module, list[Any], Evaluate]:
    """MiniLM with 192 training sentences and Spearman x 100 on the STS-B test pairs."""
    source, folder = encoders.network("minilm"), encoders.minilm_folder()
    model = source.MiniLM()
    model.load_state_dict(source.rename(load_file(folder / "model.safetensors")))
    tokenizer = source.WordPiece(str(folder / "vocab.txt"))
    pairs = encoders.stsb("test")
    texts, scores = [p[0] for p in pairs] + [p[1] for p in pairs], np.array([p[2] for p in pairs])

    def evaluate(candidate: nn.Module) -> float:
        first, second = source.embed(candidate, tokenizer, texts).chunk(2)
        return 100 * encoders.spearman((first * second).sum(1).numpy(), scores)

    train = [s for p in encoders.stsb("train") for s in p[:2]]
    picked = [train[i] for i in np.random.default_rng(0).permutation(len(train))[:192]]
    return model.eval(), [tokenizer.batch(picked[i : i + 16]) for i in range(0, 192, 16)], evaluate


def goal(names: list[str], drop: float, budget: str, seed: int) -> None:
    """One line a network."""
    for name in names:
        model, batches, evaluate = minilm() if name == "minilm" else images(name)
        started = time.process_time()
        found = pw.tune(
            model,
            batches,
            evaluate=evaluate,
            goal=pw.Goal(max_drop=drop),
            budget=budget,
            seed=seed,
            samples=32,
        )
        cpu = time.process_time() - started
        layers = [n for n, layer in pw.state(found.model).plan.layers.items() if layer.weight is not None]
        ends = Recipe.preset("int8").keep(layers[0], layers[-1])
        usual = pw.quantize(model, batches, ends, progress=False)
        example = single(batches[0], 1)
        threads = torch.get_num_threads()
        times = run_ns({"usual": usual, "found": found.model}, example, threads=threads, seconds=3.0)
        line = {
            "network": name, "met": found.met, "seconds": found.seconds, "cpu_seconds": cpu,
            "threads": torch.get_num_threads(), "stopped": found.stopped,
            "float": found.trials[0].score, "score": found.chosen.score, "drop": found.chosen.drop,
            "recipe": found.chosen.name, "rung": found.chosen.rung, "trials": len(found.trials),
            "speedup_over_float": found.chosen.speedup, "kept_in_usual": [layers[0], layers[-1]],
            "speedup_over_usual": times["usual"] / times["found"], "ms": times["found"] / 1e6,
        }  # fmt: skip
        print(json.dumps(line), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    first, second = verbs.add_parser("mixed"), verbs.add_parser("goal")
    first.add_argument("--limit", type=int, default=10_000)
    first.add_argument("--draws", type=int, default=5)
    second.add_argument("--only", nargs="+", default=["resnet56", "mobilenet_v2", "minilm"])
    second.add_argument("--drop", type=float, default=0.5)
    second.add_argument("--budget", default="10 min")
    for part in (first, second):
        part.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.verb == "mixed":
        mixed(options.limit, options.draws, options.seed)
    else:
        goal(options.only, options.drop, options.budget, options.seed)


if __name__ == "__main__":
    main()

"""The whole of Pennyweight in one file: from a trained network to a file that runs without PyTorch.

    python examples/one_file.py [--images 1000] [--out out]

Uses the network and the images that the package carries (Fashion-MNIST); needs no network and about half a minute.
"""

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

import pennyweight as pw
from pennyweight.demo.data import images, normalized
from pennyweight.demo.run import float_network
from pennyweight.ranges import params_of_range, ranges


def accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    return 100 * float((logits.argmax(1) == labels).mean())


def in_batches(call, x: np.ndarray, size: int = 100) -> np.ndarray:
    return np.concatenate([np.asarray(call(x[i : i + size])) for i in range(0, len(x), size)])


def eager(model: torch.nn.Module):
    """A function of numpy arrays that runs a module."""

    def call(x: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return model(torch.from_numpy(x)).numpy()

    return call


# ---------------------------------------------------------------------------------------------------------------------
# 1. The short way: one call, one file, one session.


def short_way(model, calibration, x, labels, path: Path) -> dict:
    quantized = pw.quantize(model, calibration, recipe="int8")  # the model itself is left as it was
    print(pw.journal(quantized).summary())
    pw.save(quantized, path)

    session = pw.load(path)  # needs neither torch nor the model's code: pennyweight.runtime.load is the same
    print(session)
    print(f"why this backend: {session.note}")
    return {
        "float": accuracy(in_batches(eager(model), x), labels),
        "int8 file": accuracy(in_batches(session.run, x), labels),
    }


# ---------------------------------------------------------------------------------------------------------------------
# 2. The long way: the same steps one by one, each of which can be looked at.


def long_way(model, calibration, x) -> torch.nn.Module:
    example = calibration[0]

    # Who feeds whom: recorded from one eager run. Any Python control flow will do.
    graph = pw.record(model, example)
    print(f"{len(graph)} calls, the first of them: {', '.join(node.name for node in graph.nodes[1:6])}")

    # What is quantized is decided by rules: the first that matches a layer wins, one that matches nothing is an error.
    recipe = pw.Recipe.preset("int8").keep("classifier")
    prepared = pw.prepare(model, example, recipe)
    plan = pw.state(prepared).plan
    print(f"{len(plan.sites())} tensors get a spec; kept in float: {plan.kept}")
    print("for example", {str(site): str(spec) for site, spec in list(plan.sites().items())[:3]})

    # Twins share the float parameters: the model still trains, and its checkpoints still load.
    assert dict(prepared.named_parameters())["stem.weight"].shape == model.stem.weight.shape

    # One sweep over the data fills every statistic that any pass asked for.
    pw.calibrate(prepared, calibration)
    ranges_found = {e.site: (e.data["lo"], e.data["hi"]) for e in pw.journal(prepared).of("range")}
    print("range of the network's input:", ranges_found["stem:input"])

    # Integer modules: codes and scales, one opaque op each. They run eagerly, whether or not the graph can be exported.
    converted = pw.convert(prepared)
    worst = min(pw.journal(converted).of("weight"), key=lambda event: event.data["sqnr_db"])
    print(f"the weight that suffers most: {worst.site}, {worst.data['sqnr_db']:.1f} dB")

    # The one program: made once, from the integer model. Integer layers give the same bits everywhere.
    program = pw.lower(converted, example)
    print("\n".join(str(program).splitlines()[:4]))
    measured = pw.difference(converted, program, example)
    print(f"program against the integer modules: {measured}")
    assert measured["sqnr_db"] > 40  # equal but for codes next to a rounding tie, and sums of the float layer

    values = pw.interpret(program, {"x": x[:4]})
    assert np.allclose(values[program.outputs[0]], eager(converted)(x[:4]), atol=0.01)
    return converted


# ---------------------------------------------------------------------------------------------------------------------
# 3. A recipe is data: rules and passes, in TOML. What is registered by name can be used by name.

MINE = """
name = "mine"

[[rules]]                      # the first convolution keeps 8 bits
match = "stem"
weight = "int8n[1,*]"
input = "uint8[*]+z"

[[rules]]                      # 4-bit weights elsewhere, one scale per output channel
weight = "int4n[1,*]"
input = "uint8[*]+z"

[[passes]]
pass = "fold_batch_norm"

[[passes]]
pass = "calibrate"
range = "shrunk"
options = { share = 0.97 }

[[passes]]
pass = "solve"
solver = "rtn"
range = "mse"
"""


@dataclass(frozen=True)
class Shrunk:
    """`[share * min x, share * max x]`: the outermost values are clipped."""

    share: float = 0.95
    needs: ClassVar[str] = "minmax"  # the statistic that calibration must collect for it

    def __call__(self, stat, spec):
        return params_of_range(self.share * stat.lo, self.share * stat.hi, spec)


def add_a_range_rule() -> None:
    """One new entry in a registry: recipes, command line and conformance tests take it up."""
    if "shrunk" not in ranges:
        ranges.add("shrunk", Shrunk)


# ---------------------------------------------------------------------------------------------------------------------
# 4. What is wrong is said: what, where, and what to do instead.


def mistakes(model, calibration, session) -> list[str]:
    said = []
    for attempt in (
        lambda: pw.quantize(model, calibration, recipe="int9"),
        lambda: pw.quantize(model, calibration, pw.Recipe.preset("int8").keep("blocks.7.*")),
        lambda: pw.quantize(model, [calibration[0] * float("nan")]),
        lambda: session.run(np.zeros((1, 28, 28), np.float32)),
        lambda: session.run(np.zeros((1, 1, 28, 28))),
    ):
        try:
            attempt()
        except pw.PennyweightError as error:
            said.append(f"{type(error).__name__}: {error}")
    return said


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=Path("out"))
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)

    data = images()
    x, labels = normalized(data.test[: args.images]), data.labels[: args.images]
    calibration = list(torch.from_numpy(normalized(data.calibration[:256])).split(64))
    model = float_network()

    print("-- the short way")
    results = short_way(model, calibration, x, labels, args.out / "one_file.dwt")

    print("-- the long way")
    converted = long_way(model, calibration, x)
    results["classifier in float"] = accuracy(in_batches(eager(converted), x), labels)

    print("-- a recipe of one's own")
    add_a_range_rule()
    mine = pw.quantize(model, calibration, pw.Recipe.parse(MINE))
    results["4-bit weights"] = accuracy(in_batches(eager(mine), x), labels)

    print("-- mistakes")
    session = pw.load(args.out / "one_file.dwt")
    said = mistakes(model, calibration, session)
    print("\n".join(said))

    print(f"-- top-1 accuracy on the first {len(x)} test images")
    for name, value in results.items():
        print(f"{name:<20} {value:.2f} %")
    start = time.perf_counter()
    session.run(x[:1])
    print(f"one image through the file: {1e3 * (time.perf_counter() - start):.2f} ms")
    return {"results": results, "said": said}


if __name__ == "__main__":
    main()

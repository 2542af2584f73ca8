"""Top-1 of image networks, ours and peers, side by side: the same float networks, calibration and test images.

usage: python benchmarks/peers_accuracy.py [--peers TOOL=PYTHON ...] [--only NETWORK ...] [--methods METHOD ...]
                                           [--bits W4A8 ...] [--limit N] [--draws 0 ...] [--ten-crops] [--seed 0]
                                           [--json FILE]

    --peers nncf=/path/python ...    environments that hold a peer, with torch, numpy and Pillow: nncf, onnxruntime,
                                     brevitas, inc, aimet (contenders/classes.py)

Ours are the presets `int8` and `int8-accurate` at W8A8, `int8` also with adapted batch norms, GPTQ and descent with
measured biases or retargeted as in methods.py below, all on the engine's integer programs. Peers are the methods of
contenders/classes.py, on kernels of their own if any. CIFAR networks calibrate on 512 training images (every 97th;
`--draws`: from which number on), ImageNet networks on 100 of other classes than the 500; no labels. At 4 bits the first
convolution and the classifier stay at 8. With `--ten-crops` MobileNetV2 is tested on ten crops of each image. Rows that
FILE holds already are not measured again. One standard error of a drop is about 100 sqrt((1 - agree) / n).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from methods import BITS, ENDS, FEW, SMOOTHED, Bench, rule, step
from pictures import NETWORKS, data_folder, network_of

from pennyweight.recipe import Recipe

CLASSES = Path(__file__).resolve().parent / "contenders" / "classes.py"
PEERS = {
    "nncf": ("W8A8", "nncf"), "nncf mixed": ("W8A8", "nncf"),
    "onnxruntime": ("W8A8", "onnxruntime"), "onnxruntime s8": ("W8A8", "onnxruntime"),
    "inc": ("W8A8", "inc"),
    "brevitas W8A8": ("W8A8", "brevitas"), "brevitas W8A8 relu": ("W8A8", "brevitas"),
    "brevitas W4A8": ("W4A8", "brevitas"), "brevitas W4A8 relu": ("W4A8", "brevitas"),
    "brevitas W4A4": ("W4A4", "brevitas"),
    "aimet W8A8": ("W8A8", "aimet"), "aimet W8A8 equalized": ("W8A8", "aimet"),
    "aimet W4A8": ("W4A8", "aimet"), "aimet W4A8 equalized": ("W4A8", "aimet"), "aimet W4A4": ("W4A4", "aimet"),
}  # fmt: skip
RELU6 = ("mobilenet_v2", "mcunet")
Row = dict[str, Any]


def ours(network: str) -> Iterator[tuple[str, str, str]]:
    """Bits, method and recipe of our rows."""
    for preset in ("int8", "int8-accurate"):
        yield "W8A8", preset, Recipe.preset(preset).to_text()
    if network not in ("mobilenet_v2", "squeezenet"):  # which have no norms
        yield "W8A8", "int8, adapted norms", Recipe.preset("int8").to_text() + step("adapt_norms")
    head = "".join(rule("int8n[1,*]", "uint8[*]+z", match=f'"{m}"') for m in ENDS[network])
    head += rule("int8n[1,*]", "uint8[*]+z", types='["add"]')
    smooth = SMOOTHED if network in RELU6 else ""
    for bits in ("W4A8", "W4A4"):
        for method in ("GPTQ", "descent", "GPTQ, retargeted", "descent, retargeted"):
            yield bits, method, head + rule(*BITS[bits]) + step("fold_batch_norm") + smooth + FEW[method]({})


def rows(
    bench: Bench, args: argparse.Namespace, known: list[tuple[str, str, str]], options: dict[str, Any]
) -> Iterator[Row]:
    """One row a method that is not known yet; `options` are those that the network was made with."""
    name, labels, pythons = (
        bench.network.name,
        bench.network.labels,
        dict(p.split("=", 1) for p in args.peers),
    )
    wanted = bench.logits.argmax(1).numpy()

    def fresh(bits: str, method: str) -> bool:
        chosen = (not args.methods or method in args.methods) and (not args.bits or bits in args.bits)
        return chosen and (name, bits, method) not in known

    for bits, method, text in ours(name):
        if fresh(bits, f"ours, {method}"):
            row = bench.row(bits, method, text, args.seed)
            yield {"network": name, "bits": bits, "method": f"ours, {method}", "top1": row.top1,
                   "float_top1": row.float_top1, "agree": row.agree, "count": row.count,
                   "seconds": row.seconds}  # fmt: skip
    for method, (bits, tool) in PEERS.items():
        useless = method.endswith(" relu") and name not in RELU6
        if tool not in pythons or useless or not fresh(bits, method):
            continue
        start = time.perf_counter()
        found = run_peer(pythons[tool], method, name, options)
        if found is None:
            print(f"{name}: {method} failed", file=sys.stderr)
            continue
        yield {"network": name, "bits": bits, "method": method, "top1": 100 * float((found == labels).mean()),
               "float_top1": 100 * float((wanted == labels).mean()),
               "agree": 100 * float((found == wanted).mean()), "count": len(found),
               "seconds": time.perf_counter() - start}  # fmt: skip


def run_peer(python: str, method: str, network: str, options: dict[str, Any]) -> np.ndarray | None:
    """The classes that a peer gives the test images, or None where it fails; what it prints goes to stderr."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "classes.npy"
        command = [python, str(CLASSES), method, network, json.dumps(options), str(file)]
        env = {**os.environ, "PENNYWEIGHT_DATA": str(data_folder())}
        done = subprocess.run(command, env=env, stdout=sys.stderr, check=False)
        return np.load(file) if done.returncode == 0 else None


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peers", nargs="*", default=[], metavar="TOOL=PYTHON")
    parser.add_argument("--only", nargs="+", choices=sorted(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--methods", nargs="+")
    parser.add_argument("--bits", nargs="+", choices=("W8A8", "W4A8", "W4A4"))
    parser.add_argument("--limit", type=int, help="first images only")
    parser.add_argument(
        "--draws", type=int, nargs="+", default=[0], help="sets of calibration images, of CIFAR networks"
    )
    parser.add_argument("--ten-crops", action="store_true", help="of each test image")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the rows to this file, beside those it holds")
    args = parser.parse_args()
    unknown = {p.split("=")[0] for p in args.peers} - {tool for _, tool in PEERS.values()}
    if unknown:
        parser.error(f"no peer is called {', '.join(sorted(unknown))}")
    kept = json.loads(args.json.read_text()) if args.json and args.json.exists() else []
    print(
        "| network | draw | bits | method | top-1 | float | drop | same class | images | s |\n|" + "---|" * 10
    )
    for name, draw in ((name, draw) for name in args.only for draw in args.draws):
        options = {"limit": args.limit, "draw": draw, "ten": args.ten_crops}
        bench = Bench(network_of(name, **options))
        same = [r for r in kept if (r.get("draw", 0), r.get("ten", False)) == (draw, args.ten_crops)]
        for row in rows(bench, args, [(r["network"], r["bits"], r["method"]) for r in same], options):
            kept.append(row | {"draw": draw, "ten": args.ten_crops})
            cells = (name, str(draw), row["bits"], row["method"], f"{row['top1']:.2f}", f"{row['float_top1']:.2f}",
                     f"{row['float_top1'] - row['top1']:.2f}", f"{row['agree']:.2f} %", str(row["count"]),
                     f"{row['seconds']:.0f}")  # fmt: skip
            print("| " + " | ".join(cells) + " |", flush=True)
            if args.json:
                args.json.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()

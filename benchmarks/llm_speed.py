"""A Llama of 16 layers, 2048 wide, 16 heads of queries and 4 of keys, 5632 in its MLP, 32,000 tokens; random weights.

usage: python benchmarks/llm_speed.py shape --out FOLDER [--layers 16]
       python benchmarks/llm_speed.py memory --out FOLDER [--layers 2] [--kills 3] [--source DIRECTORY]

    shape     writes FOLDER/shape-LAYERS as a Hugging Face directory of bf16 weights
    memory    GPTQ to w4a8 on 32 windows of 512 tokens: peak above the packages, against one block and the tables as
              float32; then again, killed at random points and gone on with, bytes compared. With a directory: of its
              model in the place of this one, for the kills

Speed: llm_peers.py.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np

SHAPE = {
    "hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 16, "num_key_value_heads": 4,
    "vocab_size": 32000, "max_position_embeddings": 2048, "tie_word_embeddings": False, "bos_token_id": None,
    "eos_token_id": None, "rms_norm_eps": 1e-5,
}  # fmt: skip


def shape(args: argparse.Namespace) -> Path:
    """Random weights, one file a block."""
    import torch
    import transformers
    from safetensors.torch import save_file

    folder = Path(args.out) / f"shape-{args.layers}"
    if folder.is_dir():
        return folder
    made = folder.with_suffix(".tmp")
    made.mkdir(parents=True, exist_ok=True)
    config = transformers.LlamaConfig(**SHAPE, num_hidden_layers=args.layers)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(made)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    draw = torch.Generator().manual_seed(0)
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for name, p in model.named_parameters():
        part = name.split(".")[2] if name.startswith("model.layers.") else "outer"
        value = (
            torch.ones(p.shape) if p.ndim == 1 else torch.randn(p.shape, generator=draw) * p.shape[1] ** -0.5
        )
        parts.setdefault(part, {})[name] = value.bfloat16()
    index = {}
    for i, (part, tensors) in enumerate(parts.items()):
        save_file(tensors, made / f"model-{i}.safetensors")
        index |= dict.fromkeys(tensors, f"model-{i}.safetensors")
        print(part, flush=True)
    (made / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    made.rename(folder)
    return folder


RUN = """
import json, sys, torch, transformers
from pennyweight.llm.quantize import quantize
from pennyweight.llm.request import Request
from pennyweight.measure import peak_bytes
import pennyweight.llm.load
from transformers.models.llama import modeling_llama
torch.set_num_threads(int(sys.argv[3]))
base = peak_bytes()
ids = torch.randint(0, int(sys.argv[4]), (32, 512), generator=torch.Generator().manual_seed(0))
def say(e):
    print(json.dumps(e), flush=True)
quantize(sys.argv[1], sys.argv[2], Request("w4a8", method="gptq"), ids, say)
print(json.dumps({"what": "peak", "bytes": peak_bytes() - base}))
"""


def memory(args: argparse.Namespace) -> None:
    """Peak, and bytes after kills."""
    import shutil

    folder = Path(args.source) if args.source else shape(args)
    config = json.loads((folder / "config.json").read_text())
    whole, killed = (Path(args.out) / n for n in ("whole", "killed"))
    for path in (whole, killed):
        shutil.rmtree(path, ignore_errors=True)
        shutil.rmtree(path.parent / f".{path.name}.partial", ignore_errors=True)

    def command(out: Path) -> list[str]:
        words = [str(v) for v in (folder, out, args.threads, config["vocab_size"])]
        return [sys.executable, "-c", RUN, *words]

    begin = time.perf_counter()
    lines = subprocess.run(command(whole), capture_output=True, text=True, check=True)
    took = time.perf_counter() - begin
    events = [json.loads(line) for line in lines.stdout.splitlines()]
    wide, inner, heads = (config[n] for n in ("hidden_size", "intermediate_size", "num_attention_heads"))
    keys = wide * config["num_key_value_heads"] // heads
    block = 4 * (2 * wide * wide + 2 * wide * keys + 3 * wide * inner)
    table = 4 * config["vocab_size"] * wide
    peak = events[-1]["bytes"]
    share = peak / (block + table)
    layers = config["num_hidden_layers"]
    print(f"{layers} layers, {took:.0f} s, peak {peak / 1e6:.0f} MB above the packages", flush=True)
    print(f"{share:.2f} times one block and the tables ({(block + table) / 1e6:.0f} MB)", flush=True)
    if not args.kills:
        return
    draw = random.Random(args.seed)
    for _ in range(args.kills):
        run = subprocess.Popen(command(killed), stdout=subprocess.DEVNULL)
        wait = draw.uniform(8.0, max(9.0, 0.6 * took))
        time.sleep(wait)
        run.send_signal(signal.SIGKILL)
        partial = killed.parent / f".{killed.name}.partial"
        done = len(list(partial.glob("block-*"))) if run.wait() < 0 else "all"
        print(f"killed after {wait:.0f} s, {done} blocks done", flush=True)
    if not killed.exists():
        subprocess.run(command(killed), check=True, stdout=subprocess.DEVNULL)
    same = {p.name: p.read_bytes() for p in whole.iterdir()} == {
        p.name: p.read_bytes() for p in killed.iterdir()
    }
    print(f"bytes identical: {same}")


def read_rate(buffer: np.ndarray, threads: int) -> float:
    """Plain read of memory, GB/s: the sum of a buffer far larger than any cache, in threads."""
    import torch

    torch.set_num_threads(threads)
    x = torch.from_numpy(buffer)
    best = 0.0
    for _ in range(3):
        begin = time.perf_counter()
        x.sum()
        best = max(best, buffer.nbytes / (time.perf_counter() - begin) / 1e9)
    return best


def written(args: argparse.Namespace, to: str, scheme: str, group: int | None, head: str) -> Path:
    """A file of the shape, rounded to nearest."""
    from pennyweight.llm.quantize import quantize
    from pennyweight.llm.request import Request

    path = Path(args.out) / f"shape-{scheme}-{group}.{to}"
    if not path.exists():
        request = Request(
            scheme, group, method="rtn", head=head, embeddings="int8n[1,*]" if to == "dwt" else "", to=to
        )
        quantize(shape(args), path, request)
    return path


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("verb", choices=["shape", "memory"])
    parser.add_argument("--out", default="out/llm")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--source", default="", metavar="DIRECTORY")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    {"shape": shape, "memory": memory}[args.verb](args)


if __name__ == "__main__":
    main()

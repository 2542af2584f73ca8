"""Perplexity beside GPTQModel, auto-round and hqq: one model, one calibration text, the same bits and groups.

usage: python benchmarks/llm_peers_accuracy.py --out FOLDER [--model bpe] [--rows 4:32,3:64,2:32] [--windows 128]
           [--limit 0] [--steps 200] [--gptqmodel PYTHON] [--auto-round PYTHON] [--hqq PYTHON]

FOLDER is that of llm.py. Each peer quantizes in an environment of its own, with its own defaults, from the same windows
of 256 tokens; what it wrote is loaded and measured by the code that measures ours, on the same windows of test text.
Printed: both perplexities and the mean difference of the windows' losses (ours less theirs, in per cent of perplexity)
with its standard error. GPTQ and AutoRound: symmetric. HQQ: with zero points, whole at 4 bits and not at fewer, as hqq
has them.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import time
from pathlib import Path

import numpy as np
import torch

from llm import WINDOW, given, measured
from pennyweight.llm.evaluate import Perplexity, perplexity
from pennyweight.llm.load import load
from pennyweight.llm.request import Request

BEGIN = """
import json, sys
import numpy as np, torch
source, ids, out, bits, group, steps, threads = sys.argv[1:3] + [sys.argv[3]] + [int(v) for v in sys.argv[4:]]
torch.set_num_threads(threads)
torch.manual_seed(0)
ids = np.load(ids)
"""
GPTQMODEL = (
    BEGIN
    + """
from gptqmodel import GPTQModel, QuantizeConfig
config = QuantizeConfig(bits=bits, group_size=group or -1, sym=True)
model = GPTQModel.load(source, config, device="cpu", dtype=torch.float32)
model.quantize([{"input_ids": r.tolist(), "attention_mask": [1] * len(r)} for r in ids], batch_size=8)
model.save(out)
"""
)
AUTO_ROUND = (
    BEGIN
    + """
import pathlib, transformers
from auto_round import AutoRound
from tokenizers import Tokenizer
from tokenizers.models import BPE
model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
reader = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE()))  # asked for, never used
made = AutoRound(model, reader, bits=bits, group_size=group or -1, sym=True, iters=steps, nsamples=len(ids), amp=False,
                 seqlen=ids.shape[1], batch_size=8, dataset=list(torch.tensor(ids).split(8)), device_map="cpu")
made.quantize_and_save(out, format="fake")
for path in pathlib.Path(out).rglob("config.json"):  # its weights are dequantized floats
    config = json.loads(path.read_text())
    config.pop("quantization_config", None)
    path.write_text(json.dumps(config))
"""
)
HQQ = (
    BEGIN
    + """
import transformers
from hqq.core.quantize import Quantizer
model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
for layer in model.model.layers.modules():
    if isinstance(layer, torch.nn.Linear):
        codes, meta = Quantizer.quantize(layer.weight.data, nbits=bits, group_size=group or None, axis=1, optimize=True,
                                         round_zero=bits == 4, device="cpu", compute_dtype=torch.float32)
        layer.weight.data = Quantizer.dequantize(codes, meta).float().reshape(layer.weight.shape)
model.save_pretrained(out)
"""
)


def padded(source: Path, out: Path) -> Path:
    """A copy of the model whose tokenizer names a token to pad with, the first of its vocabulary: GPTQModel refuses one
    without, and never pads windows of one length.
    """
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(source, out)
    vocabulary = json.loads((out / "tokenizer.json").read_text("utf8"))["model"]["vocab"]
    config = json.loads((out / "tokenizer_config.json").read_text("utf8"))
    config["pad_token"] = min(vocabulary, key=vocabulary.get)
    (out / "tokenizer_config.json").write_text(json.dumps(config), "utf8")
    return out


def theirs(
    python: str, code: str, source: Path, calib: Path, bits: int, group: int, args: argparse.Namespace
) -> Path:
    """The folder that a peer made.

    Raises:
        RuntimeError: if it failed, with the end of what it said.
    """
    out = Path(args.out).resolve() / f"peer-{os.getpid()}"
    shutil.rmtree(out, ignore_errors=True)
    paths = [str(p.resolve()) for p in (source, calib, out)]
    options = [*paths, *(str(v) for v in (bits, group, args.steps, args.threads))]
    env = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "GPTQMODEL_CPU_WORKERS": "2",
    }  # with one, its default of two cores, it stops
    done = subprocess.run(
        [python, "-c", code, *options], env=env, capture_output=True, text=True, check=False, cwd=args.out
    )  # where one of them leaves its logs
    if done.returncode:
        raise RuntimeError(f"{python} failed:\n{done.stderr[-3000:]}")
    return next((p.parent for p in out.rglob("config.json")), out)


def check(made: Path, source: Path, bits: int, group: int) -> None:
    """Refuse a comparison with a peer that left layers in float: every group of its weights has 2^bits values at most.

    Raises:
        RuntimeError: with the layers' names.
    """
    ours, theirs_ = load(source), load(made)
    left = []
    for name, layer in ours.named_modules():
        if isinstance(layer, torch.nn.Linear) and ".layers." in name:
            peer = theirs_.get_submodule(name)
            if not isinstance(peer, torch.nn.Linear):
                continue  # read from codes
            row = peer.weight.detach()[0].view(-1, group or layer.in_features)[0]
            left += [name] if len(row.unique()) > 2**bits else []
    if left:
        raise RuntimeError(f"the peer left {len(left)} layers in float, {left[0]} among them")


def beside(name: str, ours: Perplexity, peer: Perplexity) -> str:
    """One row: both, and the paired difference."""
    apart = ours.losses - peer.losses
    error = 100 * float(apart.std()) / math.sqrt(len(apart))
    mean = 100 * float(apart.mean())
    return f"{name:26} peer {peer.value:9.4f}  ours {ours.value:9.4f}  {mean:+7.3f} +- {error:.3f} %"


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="out/llm")
    parser.add_argument("--model", default="bpe", choices=["bpe", "stories"])
    parser.add_argument("--rows", default="4:32,3:64,2:32")
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--limit", type=int, default=0, help="test windows at most; 0 for all")
    parser.add_argument("--steps", type=int, default=200, help="of AutoRound")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    for name in ("gptqmodel", "auto-round", "hqq"):
        parser.add_argument(f"--{name}", default="", metavar="PYTHON")
    parser.add_argument("--options", default="{}", help="of our request, JSON: awq, retarget")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    source, ids, test = given(args)
    calib = Path(args.out) / f"calib-{os.getpid()}.npy"
    np.save(calib, ids.numpy())
    copied = padded(source, Path(args.out) / f"padded-{os.getpid()}") if args.gptqmodel else source
    base = perplexity(load(source), test, WINDOW, limit=args.limit)
    print(f"float {base.value:.4f}, {base.tokens} tokens, {base.windows} windows of {WINDOW}", flush=True)
    peers = [
        ("gptq", args.gptqmodel, GPTQMODEL),
        ("autoround", args.auto_round, AUTO_ROUND),
        ("hqq", args.hqq, HQQ),
    ]
    for method, python, code in peers:
        for row in args.rows.split(",") if python else []:
            bits, group = (int(v) for v in row.split(":"))
            scheme = f"w{bits}a16"
            if method == "hqq":
                block = f"[{group}]" if group else "[1,*]"
                scheme = f"uint{bits}{block}+{'z' if bits == 4 else 'zf'}^fp16"
            request = Request(scheme, None if "[" in scheme else group, method=method, steps=args.steps,
                              **json.loads(args.options))  # fmt: skip
            ours, took = measured(
                source, Path(args.out) / f"ours-{os.getpid()}", request, ids, test, args.limit
            )
            start = time.perf_counter()
            made = theirs(python, code, copied if method == "gptq" else source, calib, bits, group, args)
            peer_took = time.perf_counter() - start
            check(made, source, bits, group)
            peer = perplexity(load(made), test, WINDOW, limit=args.limit)
            print(f"{beside(f'{method} {scheme}', ours, peer)}  {peer_took:.0f} s, {took:.0f} s", flush=True)
    calib.unlink()
    if copied != source:
        shutil.rmtree(copied)


if __name__ == "__main__":
    main()

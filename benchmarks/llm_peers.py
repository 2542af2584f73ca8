"""Prompt and decoding speed of our engine and of others on one Llama-shaped network, round by round in turns.

usage: python benchmarks/llm_peers.py --out FOLDER [--rounds 7] [--prompts 128 512] [--tokens 32]
           [--llama PYTHON] [--openvino PYTHON] [--bf16]

Every contender is a process of its own that has loaded its model and waits; it is told to run one round, alone, after
a plain read of memory: the prompt (the logits of its last token), then --tokens tokens one by one behind 128 others.
FOLDER is that of llm_speed.py: the network is made there where it is missing. --llama: an interpreter with
llama-cpp-python (Q4_0 of our GGUF). --openvino: one with optimum-intel (int4, symmetric, groups of 128, f32; int8
activations in groups of 128; FOLDER/openvino is exported where it is missing). --bf16: transformers, PyTorch bf16. GB:
the peak of each process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
from llm_speed import read_rate, shape, written

ROUND = """
import json, sys, time
import numpy as np
path, threads, tokens, prompts = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4])
def serve(begin, step, note=""):
    draw = np.random.default_rng(0)
    ids = {n: draw.integers(0, 32000, n).tolist() for n in {*prompts, 128}}
    for n in ids:  # all memory is taken, all is planned
        begin(); step(ids[n]); step([1])
    print(json.dumps({"ready": note}), flush=True)
    for line in sys.stdin:
        found = {}
        for n in prompts:
            begin(); start = time.perf_counter(); step(ids[n])
            found[f"prompt {n}"] = n / (time.perf_counter() - start)
        begin(); step(ids[128]); step([1])
        start = time.perf_counter()
        for t in range(tokens): step([t])
        found["decode"] = tokens / (time.perf_counter() - start)
        status = dict(l.split(":", 1) for l in open("/proc/self/status") if ":" in l)
        found["GB"] = int(status["VmHWM"].split()[0]) / 1e6
        found["GB now"] = int(status["VmRSS"].split()[0]) / 1e6
        print(json.dumps(found), flush=True)
"""
OURS = (
    ROUND
    + """
from pennyweight.runtime.decode import load_decoding
decoding = load_decoding(path, threads=threads)
serve(decoding.begin, decoding.step, decoding.session.engine.isa)
"""
)
LLAMA = (
    ROUND
    + """
import llama_cpp
from llama_cpp import Llama
model = Llama(path, n_ctx=1024, n_batch=512, n_threads=threads, n_threads_batch=threads, verbose=False)
serve(model.reset, lambda ids: model.eval(ids), llama_cpp.__version__)
"""
)
OPENVINO = (
    ROUND
    + """
import openvino as ov
from openvino import opset13 as ops
core = ov.Core()
model = core.read_model(path)
product = next(r for r in model.get_results() if "logits" in r.input_value(0).get_names())
product = product.input_value(0).get_node()
while product.get_type_name() != "MatMul": product = product.input_value(0).get_node()
last = ops.slice(product.input_value(0), np.array([-1]), np.array([2**31 - 1]), np.array([1]), np.array([1]))
product.input(0).replace_source_output(last.output(0))
model.validate_nodes_and_infer_types()
compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads,
                                             "DYNAMIC_QUANTIZATION_GROUP_SIZE": "128", "PERFORMANCE_HINT": "LATENCY"})
request = compiled.create_infer_request()
seen = 0
names = {n for i in compiled.inputs for n in i.get_names()}
def begin():
    global seen
    seen = 0
    request.reset_state()
def step(ids):
    global seen
    n = len(ids)
    feed = {"input_ids": np.array([ids]), "attention_mask": np.ones((1, seen + n), np.int64),
            "position_ids": np.arange(seen, seen + n)[None], "beam_idx": np.zeros(1, np.int32)}
    request.infer({k: v for k, v in feed.items() if k in names})
    seen += n
serve(begin, step, ov.__version__)
"""
)
BF16 = (
    ROUND
    + """
import torch, transformers
torch.set_num_threads(threads)
model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
cache = None
def begin():
    global cache
    cache = transformers.DynamicCache()
@torch.inference_mode()
def step(ids):
    model(torch.tensor([ids]), past_key_values=cache, use_cache=True, logits_to_keep=1)
serve(begin, step, torch.__version__)
"""
)


class Contender:
    """A process that runs a round when it is told to."""

    def __init__(self, name: str, python: str, code: str, path: Path, args: argparse.Namespace) -> None:
        self.name, self.path = name, path
        numbers = [str(args.threads), str(args.tokens), json.dumps(args.prompts)]
        self.process = subprocess.Popen(
            [python, "-c", code, str(path), *numbers],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.rounds: list[dict[str, float]] = []
        self.note = self._line()["ready"]

    def _line(self) -> dict:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise SystemExit(f"{self.name} ended with {self.process.wait()}")

    def round(self) -> dict[str, float]:
        """One round's tokens a second, and memory."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        self.rounds.append(self._line())
        return self.rounds[-1]


def exported(args: argparse.Namespace) -> Path:
    """The network as OpenVINO's int4."""
    folder = Path(args.out) / "openvino"
    if not folder.is_dir():
        command = [
            str(Path(args.openvino).with_name("optimum-cli")), "export", "openvino", "--model", str(shape(args)),
            "--task", "text-generation-with-past", "--weight-format", "int4", "--sym", "--group-size", "128",
            "--ratio", "1.0", str(folder),
        ]  # fmt: skip
        subprocess.run(command, check=True)
    return folder / "openvino_model.xml"


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="out/llm")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--prompts", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--groups", type=int, nargs="+", default=[32])
    parser.add_argument("--llama")
    parser.add_argument("--openvino")
    parser.add_argument("--bf16", action="store_true")
    args = parser.parse_args()
    args.layers = 16
    running = []
    for group in args.groups:
        path = written(args, "dwt", "w4a8", group, "w4a8")
        running.append(Contender(f"ours g{group}", sys.executable, OURS, path, args))
    if args.llama:
        running.append(
            Contender("llama.cpp", args.llama, LLAMA, written(args, "gguf", "w4a16", 32, "same"), args)
        )
    if args.openvino:
        running.append(Contender("OpenVINO", args.openvino, OPENVINO, exported(args), args))
    if args.bf16:
        running.append(Contender("PyTorch bf16", sys.executable, BF16, shape(args), args))
    for c in running:
        print(f"{c.name}: {c.note}", flush=True)
    buffer = np.ones(400_000_000 // 4, np.float32)
    for _ in range(args.rounds):
        for c in running:
            rate = read_rate(buffer, args.threads)
            found = c.round() | {"read GB/s": rate}
            print(f"{c.name:14}" + ", ".join(f"{k} {v:.4g}" for k, v in found.items()), flush=True)
    first, *others = running
    for c in running:
        keys = [k for k in c.rounds[0] if not k.startswith("GB")]
        print(
            f"{c.name:14}" + ", ".join(f"{k} {statistics.median(r[k] for r in c.rounds):.4g}" for k in keys)
        )
    for c in others:
        for key in c.rounds[0]:
            ratios = [a[key] / b[key] for a, b in zip(first.rounds, c.rounds, strict=True)]
            print(f"{first.name} / {c.name}, {key}: {statistics.median(ratios):.3f}")


if __name__ == "__main__":
    main()

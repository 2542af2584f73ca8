"""Latency of int8 networks: ours and the peers, in turns.

usage: python benchmarks/speed.py [--peers PYTHON] [--only resnet50 ...] [--contenders ours:int8 ov:int8 ...]
                                  [--threads 2] [--batch 1] [--rounds 15] [--work FOLDER] [--json FILE]

Every contender is a process of its own that loads once (`contenders/worker.py`, one file per framework, one function
per contender) and then runs in blocks of about a quarter of a second, in turns; the order is reversed every other
round, and the first call of a block is not counted. The ratio is the median over the rounds of (the peer's block
median / ours): above 1 we are faster. Peers run in their own environment (`contenders/requirements.txt`), given by
--peers or PENNYWEIGHT_PEERS; without it only ours and eager PyTorch run. Weights are random, seed 0; `cosine` compares
the output with that of eager float PyTorch, so that nobody is timed on a broken network.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import networks
import numpy as np

from pennyweight.measure import Latency, cpu_name

WORKER = Path(__file__).resolve().parent / "contenders" / "worker.py"
BLOCK_NS = 250_000_000
REFERENCE = "pytorch:float32"
PEERS = ("ov", "ort", "et", "pt2e")  # files of contenders that need the peers' environment
CONVOLUTIONS = [
    "ours:int8", "ours:int8_vnni", "ov:int8", "ov:int8_vnni", "ort:int8", "et:int8", "pt2e:int8", "ov:float32",
    REFERENCE,
]  # fmt: skip
ENCODERS = [
    "ours:int8", "ours:int8_vnni", "ours:dynamic", "ov:int8", "ov:int8_vnni", "ort:int8", "ort:dynamic", "et:dynamic",
    "pt2e:int8", "pt2e:dynamic", "ov:float32", REFERENCE,
]  # fmt: skip
FIELD = {
    "resnet50": CONVOLUTIONS,
    "resnet18": CONVOLUTIONS,
    "mobilenet_v2": CONVOLUTIONS,
    "minilm": ENCODERS,
    "bert_base": ENCODERS,
    "lstm": ["ours:int8", "ours:int8_vnni", "ov:int8", "ort:dynamic", "ov:float32", "ort:float32", REFERENCE],
}
LIMITS = {  # variables of the contender's process
    "ours:int8_vnni": {"PENNYWEIGHT_ISA": "avx512vnni"},
    "ov:int8_vnni": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI"},
}


class WorkerDied(RuntimeError):
    """A contender's process ended; the message has what it said last."""


class Worker:
    """The process of one contender."""

    def __init__(
        self, contender: str, name: str, threads: int, work: Path, python: str, batch: int = 1
    ) -> None:
        self.contender = contender
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (lives as long as the process)
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), **LIMITS.get(contender, {})}
        self.process = subprocess.Popen(
            [python, str(WORKER), contender, name, str(threads), str(work), str(batch)], stdin=subprocess.PIPE,
            text=True, stdout=subprocess.PIPE, stderr=self.log, env=environment,
        )  # fmt: skip
        self.calls = 1
        try:
            self.output = np.array(self._answer()["output"])
            self.calls = max(1, min(1000, BLOCK_NS // min(self.block())))
        except WorkerDied:
            self.close()
            raise

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.log.seek(0)
            said = self.log.read().strip().splitlines()[-1:] or ["nothing"]
            raise WorkerDied(f"{self.contender} ended with {self.process.returncode}: {said[0]}")
        found: dict[str, Any] = json.loads(line)
        return found

    def block(self) -> list[int]:
        """Nanoseconds of the calls of one block."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(f"{self.calls}\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # the answer, which does not come, says why
        return [int(t) for t in self._answer()["ns"]]

    def close(self) -> None:
        """End the process."""
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()
        self.process.wait(30)
        self.log.close()


@dataclass
class Row:
    """One contender on one network: milliseconds, the ratio to ours, and the likeness of its output to float's."""

    network: str
    contender: str
    p50: float
    p95: float
    ratio: float
    cosine: float
    calls: int


def take_turns(workers: Mapping[str, Worker], rounds: int) -> dict[str, Latency]:
    """Time the workers in blocks, in turns."""
    samples: dict[str, list[int]] = {name: [] for name in workers}
    blocks: dict[str, list[float]] = {name: [] for name in workers}
    order = list(workers)
    for _ in range(rounds):
        for name in order:
            times = workers[name].block()
            samples[name] += times
            blocks[name].append(statistics.median(times))
        order.reverse()
    return {
        name: Latency(
            statistics.median(t), sorted(t)[min(len(t) - 1, int(0.95 * len(t)))], len(t), tuple(blocks[name])
        )
        for name, t in samples.items()
    }


def cosine(x: np.ndarray, y: np.ndarray) -> float:
    """Cosine of the angle between two vectors."""
    return float(x @ y / (np.linalg.norm(x) * np.linalg.norm(y)))


def compete(
    name: str, contenders: Iterable[str], pythons: Mapping[str, str], threads: int, rounds: int, work: Path,
    batch: int = 1,
) -> list[Row]:  # fmt: skip
    """Measure contenders on one network; the first is what the others are compared with."""
    workers: dict[str, Worker] = {}
    try:
        for contender in contenders:
            file = contender.partition(":")[0]
            python = pythons.get(file, sys.executable)
            workers[contender] = Worker(contender, name, threads, work, python, batch)
        found = take_turns(workers, rounds)
        first, truth = next(iter(workers)), workers.get(REFERENCE)
        return [
            Row(name, c, t.ms, t.p95 / 1e6, found[first].speedup_over(t),
                cosine(workers[c].output, truth.output) if truth else float("nan"), t.calls)
            for c, t in found.items()
        ]  # fmt: skip
    finally:
        for worker in workers.values():
            worker.close()


def table(rows: list[Row]) -> str:
    """Aligned text."""
    head = ("network", "contender", "p50 ms", "p95 ms", "ours is x faster", "cosine", "calls")
    cells = [
        (
            r.network,
            r.contender,
            f"{r.p50:.3f}",
            f"{r.p95:.3f}",
            f"{r.ratio:.2f}",
            f"{r.cosine:.4f}",
            str(r.calls),
        )
        for r in rows
    ]
    widths = [max(len(row[i]) for row in [head, *cells]) for i in range(len(head))]
    return "\n".join(
        "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in [head, *cells]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peers", default=os.environ.get("PENNYWEIGHT_PEERS", ""), help="their python")
    parser.add_argument("--only", nargs="+", choices=sorted(networks.NETWORKS), default=list(FIELD))
    parser.add_argument("--contenders", nargs="+", help="the first is compared with the others")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--work", type=Path, help="keeps the networks that were made")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    options = parser.parse_args()
    pythons = dict.fromkeys(PEERS, options.peers)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        work = (options.work or Path(scratch)) / f"batch{options.batch}"  # some files hold the sizes
        work.mkdir(parents=True, exist_ok=True)
        for name in options.only:
            wanted = options.contenders or FIELD[name]
            wanted = [c for c in wanted if options.peers or c.partition(":")[0] not in PEERS]
            rows += compete(name, wanted, pythons, options.threads, options.rounds, work, options.batch)
            print(table([r for r in rows if r.network == name]) + "\n", flush=True)
    if options.json:
        meta = {
            "cpu": cpu_name(),
            "threads": options.threads,
            "batch": options.batch,
            "rounds": options.rounds,
        }
        options.json.write_text(json.dumps({**meta, "rows": [asdict(r) for r in rows]}, indent=1) + "\n")


if __name__ == "__main__":
    main()

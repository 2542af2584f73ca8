"""Language models of a few bits: perplexities, outliers, memory, interrupted runs.

usage: python benchmarks/llm.py make --out FOLDER [--steps 2400] [--model bpe256]
       python benchmarks/llm.py table --out FOLDER [--schemes w4a16:32,w3a16:64] [--methods rtn,gptq] [--windows 128]
       python benchmarks/llm.py stories --out FOLDER
       python benchmarks/llm.py outliers --out FOLDER [--model stories]
       python benchmarks/llm.py mixed --out FOLDER [--bits 3,3.5,4] [--method gptq]
       python benchmarks/llm.py gguf --out FOLDER --llama PYTHON [--schemes q4_k,q5_k,q6_k] [--model bpe256]

    make      trains a Llama (384 wide, 4 layers, 6 heads, 3 of keys and values, 1024 in its MLP, 1024 tokens, tied) on
              WikiText-2's validation text, the first 85 % of its test text and the first 90 % of tinyshakespeare, seed
              0, float32, 2400 steps of 4 windows of 256, AdamW; writes FOLDER/bpe as a Hugging Face directory and
              test.txt, calib.txt beside it. Test text: the rest. Calibration text: the first 600,000 characters of the
              training text. bpe256: 256 wide, 4 heads, 2 of keys and values, 768 in its MLP, for types whose blocks are
              256 inputs
    stories   writes FOLDER/stories, the shared stories260K as a Hugging Face directory, with its text as token ids
    outliers  three channels of every norm made 50 times as large and the weights behind them as much smaller; w8a8 with
              calibrated activations: without outliers, plain, smoothed, rotated, and with turned inputs too
    mixed     2, 3, 4 or 8 bits a layer, so many on average, beside the same number for all; groups of 32, weights alone
    table     perplexities of FOLDER/bpe on test.txt, consecutive windows of 256 tokens
    gguf      perplexities of GGUF files in llama.cpp itself (PYTHON: an interpreter with llama-cpp-python), beside our
              directory of the same scheme and the file as the package gguf decodes it, on the same windows
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import os
import shutil
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from pictures import data_folder, definition
from torch import Tensor

from pennyweight.llm.directory import Directory
from pennyweight.llm.evaluate import Perplexity, perplexity
from pennyweight.llm.load import load, load_file
from pennyweight.llm.mixed import damages
from pennyweight.llm.quantize import quantize
from pennyweight.llm.request import Request
from pennyweight.llm.text import read_tokens, windows

WINDOW, BATCH, VOCABULARY = 256, 4, 1024
SIZES = {
    "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 6,
    "num_key_value_heads": 3, "vocab_size": VOCABULARY, "max_position_embeddings": 512, "tie_word_embeddings": True,
    "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
NARROW = {"hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 4, "num_key_value_heads": 2}
MADE = {"bpe": SIZES, "bpe256": SIZES | NARROW}
LLAMA = """
import json, sys
import llama_cpp, numpy as np
rows = np.load(sys.argv[2])
model = llama_cpp.Llama(sys.argv[1], n_ctx=rows.shape[1], n_batch=rows.shape[1], n_threads=int(sys.argv[3]),
                        n_threads_batch=int(sys.argv[3]), logits_all=True, verbose=False)
losses = []
for row in rows:
    model.reset()
    model.eval(row.tolist())
    y = np.array(model.scores[: len(row) - 1], np.float64)
    top = y.max(1)
    total = top + np.log(np.exp(y - top[:, None]).sum(1))
    losses.append(float((total - y[np.arange(len(y)), row[1:]]).mean()))
print(json.dumps({"version": llama_cpp.__version__, "losses": losses}))
"""


def texts() -> tuple[str, str]:
    """Training and test text."""
    folder = data_folder() / "lm"
    wiki = [
        gzip.decompress((folder / f"wikitext2_{n}.txt.gz").read_bytes()).decode() for n in ("valid", "test")
    ]
    play = (folder / "tinyshakespeare.txt").read_text("utf8")
    cut, act = len(wiki[1]) * 85 // 100, len(play) * 9 // 10
    return wiki[0] + play[:act] + wiki[1][:cut], wiki[1][cut:] + play[act:]


def tokenizer(text: str) -> Any:
    """Byte-pair encoding learned from a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    reader = Tokenizer(models.BPE())
    reader.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    reader.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    reader.train_from_iterator(
        text.splitlines(keepends=True),
        trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=sorted(alphabet), show_progress=False),
    )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=reader)


def make(args: argparse.Namespace) -> None:
    """Train the model of byte pairs."""
    folder = Path(args.out)
    (folder / args.model).mkdir(parents=True, exist_ok=True)
    train, test = texts()
    reader = tokenizer(train)
    ids = torch.tensor(reader(train, verbose=False)["input_ids"])
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**MADE[args.model]))
    decays = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim < 2]
    maker = torch.optim.AdamW([{"params": decays, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
                              args.lr, (0.9, 0.95))  # fmt: skip
    draw = torch.Generator().manual_seed(0)
    start = time.perf_counter()
    for step in range(args.steps):
        warm = min(1.0, (step + 1) / 100)
        lr = args.lr * warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / args.steps)))
        for group in maker.param_groups:
            group["lr"] = lr
        starts = torch.randint(len(ids) - WINDOW - 1, (BATCH,), generator=draw).tolist()
        rows = torch.stack([ids[s : s + WINDOW + 1] for s in starts])
        y = model(rows[:, :-1], use_cache=False).logits
        value = F.cross_entropy(y.flatten(0, 1), rows[:, 1:].flatten())
        maker.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        maker.step()
        if step % 50 == 0 or step == args.steps - 1:
            print(f"{step} loss {value.item():.3f} {time.perf_counter() - start:.0f} s", flush=True)
    model.eval().save_pretrained(folder / args.model)
    reader.save_pretrained(folder / args.model)
    (folder / "test.txt").write_text(test, "utf8")
    (folder / "calib.txt").write_text(train[:600_000], "utf8")
    tokens = read_tokens(folder / "test.txt", Directory(folder / args.model))
    found = perplexity(load(folder / args.model), tokens, WINDOW)
    count = sum(p.numel() for p in model.parameters())
    print(f"{count / 1e6:.1f} M parameters, {len(ids)} training tokens, {args.steps * BATCH * WINDOW} seen; perplexity "
          f"{found.value:.3f} on {found.tokens} tokens")  # fmt: skip


def stories(args: argparse.Namespace) -> None:
    """stories260K as a directory, its text as ids."""
    module = definition(data_folder(), "tiny_llama")
    source, _ = module.load_bin(data_folder() / "lm" / "stories260K.bin")
    reader = module.Tokenizer(data_folder() / "lm" / "tok512.bin", 512)
    folder = Path(args.out) / "stories"
    folder.mkdir(parents=True, exist_ok=True)
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=172, num_hidden_layers=5, num_attention_heads=8, num_key_value_heads=4,
        vocab_size=512, max_position_embeddings=512, rms_norm_eps=1e-5, tie_word_embeddings=True, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    names = {"att_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm", "att.wq": "self_attn.q_proj",
             "att.wk": "self_attn.k_proj", "att.wv": "self_attn.v_proj", "att.wo": "self_attn.o_proj",
             "mlp.w1": "mlp.gate_proj", "mlp.w2": "mlp.down_proj", "mlp.w3": "mlp.up_proj"}  # fmt: skip
    found: dict[str, Tensor] = {}
    for name, tensor in source.state_dict().items():
        if name.startswith("layers."):
            _, number, rest = name.split(".", 2)
            part = rest.removesuffix(".weight")
            if part in ("att.wq", "att.wk"):  # neighbours turn together there, halves here
                heads = tensor.shape[0] // 8
                tensor = tensor.view(heads, 4, 2, 64).transpose(1, 2).reshape(tensor.shape)
            found[f"model.layers.{number}.{names[part]}.weight"] = tensor
    found["model.embed_tokens.weight"] = found["lm_head.weight"] = source.emb.weight.detach()
    found["model.norm.weight"] = source.norm.weight.detach()
    model.load_state_dict(found)
    ids: list[int] = []
    for story in (data_folder() / "lm" / "tinystories_sample.txt").read_text("utf8").split("<|endoftext|>"):
        for i, line in enumerate(story.strip().split("\n")):
            ids += reader.encode(line, bos=i == 0)
    tokens = torch.tensor(ids)
    with torch.no_grad():
        apart = (model(tokens[None, :200]).logits - source(tokens[None, :200])).abs().max()
    assert float(apart) < 1e-3, float(apart)
    model.save_pretrained(folder)
    np.save(Path(args.out) / "stories_calib.npy", tokens[:-30_000].numpy())
    np.save(Path(args.out) / "stories_test.npy", tokens[-30_000:].numpy())
    print(f"logits apart {float(apart):.1e}")


def measured(
    folder: Path, out: Path, request: Request, calib: Tensor, test: Tensor, limit: int = 0
) -> tuple[Perplexity, float]:
    """Quantize, load, evaluate, remove; and the seconds that quantizing took."""
    shutil.rmtree(out, ignore_errors=True)
    shutil.rmtree(out.parent / f".{out.name}.partial", ignore_errors=True)
    start = time.perf_counter()
    quantize(folder, out, request, calib)
    took = time.perf_counter() - start
    found = perplexity(load(out), test, WINDOW, limit=limit)
    shutil.rmtree(out)
    return found, took


def given(args: argparse.Namespace) -> tuple[Path, Tensor, Tensor]:
    """The model's folder, calibration windows and test ids."""
    folder = Path(args.out)
    source = Directory(folder / args.model)
    names = (
        ("stories_test.npy", "stories_calib.npy") if args.model == "stories" else ("test.txt", "calib.txt")
    )
    calib = windows(read_tokens(folder / names[1], source), WINDOW, args.windows, args.seed)
    return folder / args.model, calib, read_tokens(folder / names[0], source)


def outliers(args: argparse.Namespace) -> None:
    """Large channels behind the norms, and what restores them."""
    from safetensors.torch import load_file, save_file

    model, calib, test = given(args)
    folder = Path(args.out) / "outliers"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    behind = {"input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
              "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj")}  # fmt: skip
    for name in [n for n in tensors if "layernorm" in n]:
        lead, norm, _ = name.rsplit(".", 2)
        for channel in (3, 17, 40):
            tensors[name][channel] *= 50
            for reader in behind[norm]:
                tensors[f"{lead}.{reader}.weight"][:, channel] /= 50
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    base = perplexity(load(model), test, WINDOW, limit=args.limit)
    same = perplexity(load(folder), test, WINDOW, limit=args.limit)
    print(f"float {base.value:.4f}, with outliers {same.value:.4f}, {base.tokens} tokens", flush=True)
    rows: list[tuple[str, Path, dict[str, Any]]] = [
        ("no outliers", model, {}),
        ("plain", folder, {}),
        ("smooth 0.5", folder, {"smooth": 0.5}),
        ("rotate", folder, {"rotate": True}),
        ("rotate, hadamard", folder, {"rotate": True, "hadamard": True}),
    ]
    for name, source, options in rows:
        request = Request("w8a8-static", method="searched", **options)
        found, took = measured(
            source, Path(args.out) / f"outliers-{os.getpid()}", request, calib, test, args.limit
        )
        loss = 100 * (found.value / base.value - 1)
        print(f"{name:12} {found.value:9.4f}  {loss:+8.2f} %  {took:6.1f} s", flush=True)


def mixed(args: argparse.Namespace) -> None:
    """Bits chosen layer by layer beside one width for all."""
    folder = Path(args.out)
    model, calib, test = given(args)
    base = perplexity(load(model), test, WINDOW, limit=args.limit)
    print(f"float {base.value:.4f}, {base.tokens} tokens, {base.windows} windows of {WINDOW}", flush=True)
    plain = Request("w4a16", 32, method=args.method)
    start = time.perf_counter()
    found = damages(model, plain, calib, folder, lambda event: None)
    print(f"damages measured in {time.perf_counter() - start:.1f} s", flush=True)
    rows = [(f"w{b} for all", Request(f"w{b}a16", 32, method=args.method)) for b in (3, 4)]
    for bits in args.bits.split(","):
        chosen = found.choose(float(bits))
        counts = {b: list(chosen.values()).count(b) for b in sorted(set(chosen.values()))}
        name = f"{found.average(chosen):.2f} bits, layers {counts}"
        rows.append((name, found.request(plain, chosen)))
    for name, request in rows:
        got, took = measured(model, folder / f"mixed-{os.getpid()}", request, calib, test, args.limit)
        loss = 100 * (got.value / base.value - 1)
        print(f"{args.method:9} {name:42} {got.value:9.4f}  {loss:+8.2f} %  {took:6.1f} s", flush=True)


def table(args: argparse.Namespace) -> None:
    """Rows of the table: a scheme and a method each."""
    folder = Path(args.out)
    model, calib, test = given(args)
    base = perplexity(load(model), test, WINDOW, limit=args.limit)
    print(f"float {base.value:.4f}, {base.tokens} tokens, {base.windows} windows of {WINDOW}", flush=True)
    rows = []
    for text in args.schemes.split(","):
        name, _, group = text.partition(":")
        for method in args.methods.split(","):
            request = Request(name, int(group) if group else None, args.asymmetric, method, steps=args.steps,
                              **json.loads(args.options))  # fmt: skip
            found, took = measured(model, folder / f"table-{os.getpid()}", request, calib, test, args.limit)
            loss = 100 * (found.value / base.value - 1)
            rows.append({"scheme": text, "method": method, "perplexity": found.value, "loss": loss})
            print(f"{text:14} {method:12} {found.value:9.4f}  {loss:+8.2f} %  {took:6.1f} s", flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps({"float": base.value, "rows": rows}, indent=1), "utf8")


def in_llama(args: argparse.Namespace, file: Path, rows: Path) -> dict[str, Any]:
    """Mean cross entropy of every window, as llama.cpp computes a file."""
    command = [args.llama, "-c", LLAMA, str(file), str(rows), str(args.threads)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def gguf(args: argparse.Namespace) -> None:
    """Files in llama.cpp beside our own result of the same scheme."""
    model, calib, test = given(args)
    folder = Path(args.out) / f"gguf-{os.getpid()}"
    folder.mkdir()
    count = min(len(test) // WINDOW, args.limit or len(test))
    np.save(folder / "rows.npy", test[: count * WINDOW].view(count, WINDOW).numpy())
    base = perplexity(load(model), test, WINDOW, limit=count)
    print(f"float {base.value:.4f}, {base.tokens} tokens, {base.windows} windows of {WINDOW}", flush=True)
    for text in args.schemes.split(","):
        name, _, group = text.partition(":")
        request = Request(name, int(group) if group else None, method=args.method, head=args.head)
        quantize(model, folder / text, request, calib)
        quantize(model, folder / f"{text}.gguf", replace(request, to="gguf"), calib)
        ours = perplexity(load(folder / text), test, WINDOW, limit=count)
        decoded = perplexity(load_file(folder / f"{text}.gguf", model), test, WINDOW, limit=count)
        found = in_llama(args, folder / f"{text}.gguf", folder / "rows.npy")
        theirs = torch.tensor(found["losses"], dtype=torch.float64)
        value, apart = math.exp(float(theirs.mean())), (theirs - ours.losses).abs().max()
        print(f"{text:8} ours {ours.value:.4f}, file decoded {decoded.value:.4f}, llama.cpp ({found['version']}) "
              f"{value:.4f}: {100 * (value / ours.value - 1):+.3f} %, windows apart by {100 * float(apart):.3f} % "
              f"at most", flush=True)  # fmt: skip
    shutil.rmtree(folder)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb in ("make", "stories", "table", "outliers", "mixed", "gguf"):
        sub = verbs.add_parser(verb)
        sub.add_argument("--out", default="out/llm")
        sub.add_argument("--threads", type=int, default=2)
        sub.add_argument("--seed", type=int, default=0)
        if verb == "make":
            sub.add_argument("--steps", type=int, default=2400)
            sub.add_argument("--lr", type=float, default=2e-3)
            sub.add_argument("--model", default="bpe", choices=list(MADE))
        if verb in ("table", "outliers", "mixed", "gguf"):
            sub.add_argument(
                "--model", default="bpe256" if verb == "gguf" else "bpe", choices=[*MADE, "stories"]
            )
            sub.add_argument("--windows", type=int, default=128)
            sub.add_argument("--limit", type=int, default=0, help="test windows at most; 0 for all")
        if verb == "mixed":
            sub.add_argument("--bits", default="3,3.5,4")
            sub.add_argument("--method", default="searched")
        if verb == "gguf":
            sub.add_argument("--llama", required=True, help="an interpreter with llama-cpp-python")
            sub.add_argument("--schemes", default="q4_k,q5_k,q6_k")
            sub.add_argument("--method", default="searched")
            sub.add_argument("--head", default="")
        if verb == "table":
            sub.add_argument(
                "--schemes", default="w8a8,w4a8:32,w4a8:128,w4a16:32,w4a16:64,w4a16:128,w3a16:64,w2a16:32"
            )
            sub.add_argument("--methods", default="rtn,searched,gptq")
            sub.add_argument("--steps", type=int, default=200, help="of methods that train")
            sub.add_argument(
                "--options",
                default="{}",
                help="of the request, JSON: awq, smooth, rotate, hadamard, retarget",
            )
            sub.add_argument("--asymmetric", action="store_true")
            sub.add_argument("--json", default="")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    run = {
        "make": make,
        "stories": stories,
        "table": table,
        "outliers": outliers,
        "mixed": mixed,
        "gguf": gguf,
    }
    run[args.verb](args)


if __name__ == "__main__":
    main()

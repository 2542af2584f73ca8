"""`pennyweight llm`: quantize, evaluate and run language models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pennyweight.cli.options import Json, Threads
from pennyweight.cli.output import emit, note

app = typer.Typer(
    help="Language models: from a Hugging Face directory to a quantized one.", no_args_is_help=True
)

Directory = Annotated[Path, typer.Argument(help="Hugging Face directory: config.json and safetensors.")]
SchemeName = Annotated[
    str,
    typer.Option(
        help="w8a8, w4a8, w4a16, w3a16, w2a16, nf4, mxfp4, w8a8-static, w4a4, or a spec such as int4[32]^fp16."
    ),
]
GroupSize = Annotated[
    int | None, typer.Option(help="Inputs that share a scale; 0 for whole rows. Default 32, rows for int8.")
]
Asymmetric = Annotated[bool, typer.Option("--asymmetric", help="Give weights a zero point.")]
MethodName = Annotated[
    str, typer.Option(help="How codes are found; `pennyweight list methods` describes them.")
]
Head = Annotated[
    str, typer.Option(help="Scheme of the output layer, or `same`. Float where nothing is said.")
]
Embeddings = Annotated[
    str, typer.Option(help="Spec of the token table, such as int8n[1,*]. Float where nothing is said.")
]
Calib = Annotated[
    Path | None, typer.Option(help="Calibration text: .txt, .jsonl, or token ids as .npy, .npz, .pt.")
]
Windows = Annotated[int, typer.Option(min=1, help="Calibration windows at most.")]
Window = Annotated[int, typer.Option(min=2, help="Tokens of a window.")]
Seed = Annotated[int, typer.Option(help="Of everything random.")]


@app.command("quantize")
def quantize_command(
    directory: Directory,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder or file to write.")],
    scheme: SchemeName = "w4a8",
    group: GroupSize = None,
    asymmetric: Asymmetric = False,
    method: MethodName = "searched",
    calib: Calib = None,
    windows: Windows = 128,
    window: Window = 512,
    head: Head = "",
    embeddings: Embeddings = "",
    cache: Annotated[
        str, typer.Option(help="Keys and values: int8 or int4. Float where nothing is said.")
    ] = "",
    smooth: Annotated[
        float, typer.Option(help="Exponent of SmoothQuant's scales, such as 0.5; 0 for none.")
    ] = 0.0,
    awq: Annotated[bool, typer.Option("--awq", help="Scale inputs as AWQ does, before any method.")] = False,
    rotate: Annotated[bool, typer.Option("--rotate", help="Rotate the hidden states.")] = False,
    hadamard: Annotated[
        bool,
        typer.Option("--hadamard", help="Turn what no rotation of the hidden states reaches, while it runs."),
    ] = False,
    retarget: Annotated[
        bool, typer.Option("--retarget", help="Aim at what the float network would answer.")
    ] = False,
    steps: Annotated[int, typer.Option(min=1, help="Steps a block, of methods that train.")] = 200,
    rate: Annotated[
        float,
        typer.Option(min=0.0, help="Of the first of these steps. The method's own where nothing is said."),
    ] = 0.0,
    bits: Annotated[
        float,
        typer.Option(min=0.0, max=8.0, help="Choose each layer's bits: 2, 3, 4 or 8, so many on average."),
    ] = 0.0,
    max_perplexity_loss: Annotated[
        float,
        typer.Option(
            min=0.0, help="Choose each layer's bits: as few as lose so many percent on the text of --verify."
        ),
    ] = 0.0,
    to: Annotated[str, typer.Option(help="Format of the result.")] = "pennyweight",
    verify: Annotated[
        Path | None,
        typer.Option(
            help="Read the result back and take its perplexity on this text, and the float model's."
        ),
    ] = None,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Quantize DIRECTORY, decoder or encoder, block by block. Stopped anywhere, the same command goes on where it was.

    Example: pennyweight llm quantize llama/ -o llama-w4/ --scheme w4a8 --group 32 --method gptq --calib text.txt
    """
    from pennyweight.llm import directory as directories
    from pennyweight.llm.quantize import quantize
    from pennyweight.llm.request import Request
    from pennyweight.llm.text import read_tokens
    from pennyweight.llm.text import windows as cut

    request = Request(
        scheme, group, asymmetric, method, head, embeddings, windows, window, smooth=smooth, awq=awq, rotate=rotate,
        hadamard=hadamard, retarget=retarget, steps=steps, rate=rate, seed=seed, to=to, cache=cache,
    )  # fmt: skip
    ids = None
    if calib is not None:
        source = directories.Directory(directory)
        ids = cut(read_tokens(calib, source), window, windows, seed, calib.name)
    events: list[dict[str, Any]] = []

    def report(event: dict[str, Any]) -> None:
        events.append(event)
        note(progress_line(event))

    if bits or max_perplexity_loss:
        request = _mixed(directory, out, request, ids, report, bits, max_perplexity_loss, verify)
    quantize(directory, out, request, ids, report)
    size = (
        sum(f.stat().st_size for f in out.rglob("*") if f.is_file()) if out.is_dir() else out.stat().st_size
    )
    before = directories.Directory(directory).nbytes
    result: dict[str, Any] = {"out": str(out), "bytes": size, "bytes before": before}
    if verify is not None:
        result |= _verified(directory, out, verify, window)
    rows = [{"result": k, "value": v} for k, v in result.items()]
    emit({**result, "events": events}, {"": rows}, json)


def _mixed(
    directory: Path,
    out: Path,
    request: Any,
    ids: Any,
    report: Any,
    bits: float,
    percent: float,
    text: Path | None,
) -> Any:
    """The request with a scheme for every layer."""
    from pennyweight.errors import InputError
    from pennyweight.llm.directory import Directory as Folder
    from pennyweight.llm.mixed import to_bits, to_perplexity
    from pennyweight.llm.text import read_tokens

    if bits and percent:
        raise InputError("bits and a loss of perplexity are two goals", hint="Give one.")
    if ids is None:
        raise InputError("bits are chosen by what layers do to calibration text", hint="Give --calib.")
    if bits:
        return to_bits(directory, out, request, bits, ids, report)
    if text is None:
        raise InputError("there is no text to measure the perplexity on", hint="Give --verify.")
    return to_perplexity(directory, out, request, percent, ids, read_tokens(text, Folder(directory)), report)


def progress_line(event: dict[str, Any]) -> str:
    """One event of a run as a line."""
    parts = [f"{event['seconds']:8.1f} s  {event['memory'] / 1e9:6.2f} GB  {event['what']:8}"]
    if "number" in event:
        parts.append(f"{event['number']}/{event['count']}")
    parts.append(event["site"])
    if "bits" in event:
        parts.append(f"{event['bits']:.2f} bits, layers by bits {event['layers']}")
    if "loss" in event:
        parts.append(f"loss {event['loss']:.3e}")
    return " ".join(parts)


def _verified(directory: Path, out: Path, text: Path, window: int) -> dict[str, float]:
    from pennyweight.llm.directory import Directory as Folder
    from pennyweight.llm.evaluate import apart, perplexity
    from pennyweight.llm.load import load, load_file
    from pennyweight.llm.text import read_tokens

    ids = read_tokens(text, Folder(directory))
    if out.suffix == ".dwt":
        from pennyweight.llm.evaluate import decoded_perplexity
        from pennyweight.runtime.decode import load_decoding

        found = decoded_perplexity(load_decoding(out), ids, window)
    else:
        made: Any = load(out) if out.is_dir() else load_file(out, directory)
        if not made.can_generate():
            return {"relative error of the result": apart(made, load(directory), ids, window)}
        found = perplexity(made, ids, window, progress=True)
    return {
        "perplexity": found.value,
        "perplexity in float": perplexity(load(directory), ids, window, progress=True).value,
    }


@app.command("train")
def train_command(
    directory: Directory,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder or file to write.")],
    text: Annotated[Path, typer.Option(help="Training text: .txt, .jsonl, or token ids as .npy, .npz, .pt.")],
    scheme: SchemeName = "w4a8",
    group: GroupSize = None,
    head: Head = "",
    steps: Annotated[int, typer.Option(min=1, help="Steps of AdamW.")] = 200,
    lr: Annotated[float, typer.Option(help="Greatest learning rate; it falls to 0 on a cosine.")] = 3e-4,
    batch: Annotated[int, typer.Option(min=1, help="Windows of a step.")] = 8,
    window: Annotated[int, typer.Option(min=2, help="Tokens of a window.")] = 256,
    lora: Annotated[
        int,
        typer.Option(min=0, help="Rank of what is learned beside weights that stay; 0 learns the weights."),
    ] = 0,
    distill: Annotated[
        float,
        typer.Option(min=0.0, help="Factor of the divergence from the float model; 0 for the text alone."),
    ] = 1.0,
    amp: Annotated[bool, typer.Option("--amp", help="Compute in bfloat16 where autocast allows.")] = False,
    to: Annotated[str, typer.Option(help="Format of the result.")] = "pennyweight",
    verify: Annotated[
        Path | None,
        typer.Option(help="Read the result back and take its perplexity on this text, and in float."),
    ] = None,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Train DIRECTORY with rounded weights and activations, distilled from its float self; write the codes.

    Under `torchrun --nproc-per-node 2 --no-python pennyweight llm train ...` the model is cut between two processes.

    Example: pennyweight llm train llama/ -o llama-w4/ --scheme w4a8 --text train.txt --steps 500 --lora 16
    """
    from pennyweight.llm import directory as directories
    from pennyweight.llm import shards
    from pennyweight.llm.text import read_tokens
    from pennyweight.llm.train import Training, train

    request = Training(scheme, group, head, steps, lr, batch, window, lora, distill, amp, seed, to)
    events: list[dict[str, Any]] = []

    def report(event: dict[str, Any]) -> None:
        events.append(event)
        note(progress_line(event))

    with shards.launched():
        train(directory, out, request, read_tokens(text, directories.Directory(directory)), report)
        first = shards.rank() == 0
    if not first:  # reading back and printing is for one
        return
    result: dict[str, Any] = {"out": str(out)}
    if verify is not None:
        result |= _verified(directory, out, verify, window)
    emit({**result, "events": events}, {"": [{"result": k, "value": v} for k, v in result.items()]}, json)


@app.command("perplexity")
def perplexity_command(
    directory: Directory,
    text: Annotated[Path, typer.Option(help="Test text: .txt, .jsonl, or token ids as .npy, .npz, .pt.")],
    window: Window = 512,
    limit: Annotated[int, typer.Option(min=0, help="Windows at most; 0 for all.")] = 0,
    json: Json = False,
) -> None:
    """Perplexity of DIRECTORY, float or quantized, over consecutive windows of a text."""
    from pennyweight.llm.directory import Directory as Folder
    from pennyweight.llm.evaluate import perplexity
    from pennyweight.llm.load import load
    from pennyweight.llm.text import read_tokens

    ids = read_tokens(text, Folder(directory))
    found = perplexity(load(directory), ids, window, limit=limit, progress=True)
    row = {
        "perplexity": found.value,
        "tokens": found.tokens,
        "windows": found.windows,
        "window": found.window,
    }
    emit(row, {"": [row]}, json)


@app.command("generate")
def generate_command(
    model: Annotated[Path, typer.Argument(help="A .dwt file, which runs without torch, or a directory.")],
    prompt: Annotated[str, typer.Option(help="Text to continue.")] = "",
    ids: Annotated[str, typer.Option(help="Token ids to continue instead, separated by commas.")] = "",
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to add at most.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.0,
    seed: Seed = 0,
    threads: Threads = 0,
    json: Json = False,
) -> None:
    """Continue a text with MODEL, float or quantized, token by token."""
    import time

    try:
        start = [int(i) for i in ids.split(",") if i.strip()]
    except ValueError:
        raise typer.BadParameter(f"--ids {ids!r} is no list of numbers such as 1,15,9") from None
    begin = time.perf_counter()
    if model.suffix == ".dwt":
        found, said = _from_file(model, prompt, start, tokens, temperature, seed, threads, not json)
    else:
        found, said = _from_directory(model, prompt, start, tokens, temperature, seed)
    rate = len(found) / (time.perf_counter() - begin)
    if json:
        emit({"ids": found, "text": said, "tokens a second, loading included": rate}, {}, True)
    elif model.suffix != ".dwt":
        print(said or ",".join(map(str, found)))


def _from_file(
    path: Path,
    prompt: str,
    start: list[int],
    tokens: int,
    temperature: float,
    seed: int,
    threads: int,
    show: bool,
) -> tuple[list[int], str]:
    """From a program, without torch; prints as it goes."""
    from pennyweight.errors import InputError
    from pennyweight.runtime.decode import load_decoding

    decoding = load_decoding(path, threads=threads)
    reader: Any = None
    if decoding.tokenizer:
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise ImportError(f"text needs pip install tokenizers; or give --ids ({error})") from None
        reader = Tokenizer.from_str(decoding.tokenizer)
    if prompt and reader is None:
        raise InputError("the file has no tokenizer", site=path.name, hint="Give --ids.")
    found = reader.encode(prompt).ids if prompt else start
    said = "" if reader is None else str(reader.decode(found))
    if show:
        print(said or ",".join(map(str, found)), end="", flush=True)
    for token in decoding.generate(found, tokens=tokens, temperature=temperature, seed=seed):
        found = [*found, token]
        now = "" if reader is None else str(reader.decode(found))
        if show:
            print(f",{token}" if reader is None else now[len(said) :], end="", flush=True)
        said = now
    if show:
        print()
    return found, said


def _from_directory(
    path: Path, prompt: str, start: list[int], tokens: int, temperature: float, seed: int
) -> tuple[list[int], str]:
    """By `generate` of transformers."""
    import torch

    from pennyweight.errors import InputError
    from pennyweight.llm.directory import Directory as Folder
    from pennyweight.llm.evaluate import generate
    from pennyweight.llm.load import load
    from pennyweight.llm.text import encode, tokenizer

    reader = tokenizer(Folder(path))
    if prompt and reader is None:
        raise InputError("the directory has no tokenizer", site=path.name, hint="Give --ids.")
    ids = torch.tensor(encode(reader, prompt) if prompt else start)
    found = generate(load(path), ids, tokens=tokens, temperature=temperature, seed=seed).tolist()
    return found, "" if reader is None else str(reader.decode(found))


@app.command("estimate")
def estimate_command(
    directory: Directory,
    scheme: SchemeName = "w4a8",
    group: GroupSize = None,
    asymmetric: Asymmetric = False,
    method: MethodName = "searched",
    windows: Windows = 128,
    window: Window = 512,
    json: Json = False,
) -> None:
    """Memory, disk and size of the result, before a run is started."""
    from dataclasses import asdict

    import torch

    from pennyweight.llm.directory import Directory as Folder
    from pennyweight.llm.estimate import estimate
    from pennyweight.llm.methods import methods
    from pennyweight.llm.schemes import scheme_of
    from pennyweight.llm.skeleton import Skeleton

    folder = Folder(directory)
    chosen = scheme_of(scheme, group, asymmetric=asymmetric)
    reads = methods[method].gram or chosen.static
    ids = torch.empty(windows, window, dtype=torch.int64) if reads else None
    found = asdict(estimate(folder, Skeleton(folder), chosen, ids))
    emit(found, {"": [{"what": k, "value": v} for k, v in found.items()]}, json)

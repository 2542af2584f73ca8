"""From a directory to a quantized one, block by block: one block in memory, whatever the size of the model."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from pennyweight.errors import FormatError, InputError, NonFinite, NothingQuantized, PennyweightError
from pennyweight.formats import grids
from pennyweight.formats.integer import Integer
from pennyweight.llm.block import linears
from pennyweight.llm.cache import NAMES, cache_spec
from pennyweight.llm.directory import Directory
from pennyweight.llm.estimate import estimate
from pennyweight.llm.job import Job
from pennyweight.llm.memory import returning
from pennyweight.llm.methods import methods
from pennyweight.llm.request import Report, Request, Run, schemes_of
from pennyweight.llm.rotate import rotation, turned
from pennyweight.llm.schemes import Scheme, scheme_of
from pennyweight.llm.skeleton import Skeleton
from pennyweight.llm.steps import Behind, no_data, outer, solves_ends, with_data
from pennyweight.llm.stream import enter
from pennyweight.llm.superblock import is_superblock
from pennyweight.llm.targets import Quantized, targets


def quantize(
    path: str | Path,
    out: str | Path,
    request: Request,
    ids: Tensor | None = None,
    report: Report = lambda _: None,
) -> Quantized:
    """Quantize a directory of `transformers` and write the result.

    A run that was stopped goes on when it is asked for again with the same request, and gives the same bytes.

    Args:
        path: Hugging Face directory of a float model.
        out: folder or file to write; it appears when all is done.
        request: see there.
        ids: calibration windows, int64 [windows, length]; methods that read no inputs do without.
        report: called with one dict per layer and block.

    Raises:
        InputError: on unknown names, a target that exists, too little room, or a method without calibration text.
        FormatError, NonFinite, GraphError, SpecError, SolverError: see `Directory`, `Skeleton` and the solvers.
        OSError: if writing fails.
    """
    directory, out = Directory(path), Path(out)
    if directory.scheme:
        raise InputError(
            "the model is quantized already", site=directory.path.name, hint="Start from the float model."
        )
    scheme = scheme_of(request.scheme, request.group, asymmetric=request.asymmetric)
    method, target = methods[request.method], targets[request.to]
    _check_request(request, scheme, ids)
    skeleton = Skeleton(directory)
    schemes = schemes_of(skeleton, request, scheme)
    check_schemes(skeleton, schemes)
    target.check(directory, schemes)
    if skeleton.turned and not target.turned:
        raise InputError(
            f"{request.to} files have no place for layers that this family keeps as [in, out]",
            site=min(skeleton.turned).removesuffix(".weight"), hint="--to pennyweight or dwt.",
        )  # fmt: skip
    if request.hadamard and not target.hadamard:
        raise InputError(f"{request.to} files have no place for inputs that are turned", spec="--hadamard",
                         hint="--to pennyweight or dwt.")  # fmt: skip
    _check_cache(skeleton, request)
    digest = None if ids is None else hashlib.sha256(ids.numpy().tobytes()).hexdigest()
    if out.parent.is_dir():
        _check_room(directory, skeleton, scheme, ids, out.parent)
    job = Job(out, {**asdict(request), "model": directory.fingerprint(), "tokens": digest,
                    "torch": torch.__version__})  # fmt: skip
    run = Run(directory, skeleton, request, scheme, method, report)
    for name in kept_in_float(skeleton):
        run.say("kept", name)
    if request.rotate:
        run.turn = rotation(skeleton.width, request.seed)
    if (request.rotate or request.hadamard) and ids is None:  # structure is found from a run, on any tokens
        ids = torch.arange(16)[None] % int(directory.config.get("vocab_size") or 1)
    try:
        with torch.no_grad(), returning():
            behind = _blocks(run, job, ids)
            if not job.outer.is_file():
                outer(run, behind).save(job.outer)
    except (
        NonFinite,
        FormatError,
    ):  # the model is at fault: with another one nothing of this can be gone on with
        job.discard()
        raise
    result = Quantized(directory, skeleton, [*(job.block(i) for i in range(len(skeleton.blocks))), job.outer],
                       asdict(request))  # fmt: skip
    made = job.folder / "result"
    if made.is_dir():
        shutil.rmtree(made)
    run.say("write", str(out.name))
    target.write(result, made)
    job.finish(made)
    run.say("done", str(out.name))
    return result


def kept_in_float(skeleton: Skeleton) -> list[str]:
    """Weights of blocks that are matrices but no linear layer's: experts kept in one tensor, convolutions."""
    found = []
    for path in skeleton.blocks:
        layers = {f"{path}.{name}.weight" for name in linears(skeleton.model.get_submodule(path))}
        block = skeleton.model.get_submodule(path)
        found += [
            f"{path}.{n}" for n, p in block.named_parameters() if p.ndim > 1 and f"{path}.{n}" not in layers
        ]
    return found


def _check_request(request: Request, scheme: Scheme, ids: Tensor | None) -> None:
    """Refuse what does not go together.

    Raises:
        InputError: with the reason.
    """
    method = methods[request.method]
    reads = {
        f"method {request.method!r}": method.gram or method.trains, f"scheme {request.scheme!r}": scheme.static,
        "--awq": request.awq, "--smooth": request.smooth > 0, "--retarget": request.retarget,
    }  # fmt: skip
    for why, true in reads.items():
        if true and ids is None:
            raise InputError(f"{why} reads inputs, but there is no calibration text", hint="Give --calib.")
    if request.retarget and not method.gram:
        raise InputError(
            f"--retarget is for methods that read inputs, {request.method!r} does not", hint="--method gptq."
        )
    if request.rate and not method.trains:
        raise InputError(
            f"--rate is for methods that train, {request.method!r} does not", hint="--method autoround."
        )
    if not 0 <= request.smooth < 1:
        raise InputError(f"an exponent of {request.smooth}", hint="--smooth 0.5; from 0 to below 1.")
    if is_superblock(scheme.weight) and not method.ruled:
        raise InputError(
            f"{request.method!r} moves ranges off the 6 bits that superblocks keep them in", spec=str(scheme.weight),
            hint=f"--method {', '.join(n for n, m in methods.items() if m.ruled)}.",
        )  # fmt: skip
    if method.trains and not isinstance(grids[scheme.weight.grid], Integer):
        raise InputError(
            f"{request.method!r} trains codes of integers", spec=str(scheme.weight), hint="--method gptq."
        )


def _check_cache(skeleton: Skeleton, request: Request) -> None:
    """Refuse a rounded cache that does not exist, or that the file has no place for.

    Raises:
        InputError: with the reason.
    """
    if not request.cache:
        return
    cache_spec(request.cache)
    if (request.to, request.cache) not in {*(("pennyweight", name) for name in NAMES), ("dwt", "int8")}:
        raise InputError(f"{request.to} files have no place for a cache of this format", spec=request.cache,
                         hint="--to pennyweight, or --to dwt with int8.")  # fmt: skip
    if not getattr(skeleton.model, "can_generate", bool)():
        raise InputError("the model keeps no keys and values", site=type(skeleton.model).__name__,
                         hint="Leave --cache out.")  # fmt: skip


def check_schemes(skeleton: Skeleton, schemes: dict[str, Scheme]) -> None:
    """Refuse a group that divides no layer's inputs, and blocks without linear layers, before any work is done."""
    if not any(linears(skeleton.model.get_submodule(path)) for path in skeleton.blocks):
        kinds = sorted({type(m).__name__ for m in skeleton.block(0).modules() if m._parameters})
        raise NothingQuantized(
            "the blocks hold no linear layer", site=skeleton.path, hint=f"They hold {kinds}."
        )
    for path in skeleton.blocks:
        for name, layer in linears(skeleton.model.get_submodule(path)).items():
            try:
                schemes[f"{path}.{name}"].weight.bits_per_element((layer.out_features, layer.in_features))
            except PennyweightError as error:
                shapes = str((layer.out_features, layer.in_features))
                raise type(error)(error.what, site=f"{path}.{name}", spec=error.spec, shapes=shapes,
                                  hint=error.hint) from None  # fmt: skip


def _check_room(
    directory: Directory, skeleton: Skeleton, scheme: Scheme, ids: Tensor | None, folder: Path
) -> None:
    free, wanted = shutil.disk_usage(folder).free, estimate(directory, skeleton, scheme, ids).disk
    if free < wanted:
        raise InputError(
            f"the disk has {free / 1e9:.2f} GB free, the run may need {wanted / 1e9:.2f} GB", site=folder.name,
            hint="Make room, or write elsewhere.",
        )  # fmt: skip


def _blocks(run: Run, job: Job, ids: Tensor | None) -> Behind | None:
    """Every block that is not done yet; returns what is behind the last, where layers are solved on it."""
    skeleton, count = run.skeleton, len(run.skeleton.blocks)
    done, states = job.resume()
    if ids is None:
        for i in range(count):
            if not job.block(i).is_file():
                no_data(run, i).save(job.block(i))
        return None
    ends = solves_ends(run)
    if done == count and (not ends or job.outer.is_file()):
        return None
    first, calls = enter(skeleton, ids)
    if run.turn is not None:
        first = turned(first, run.turn)
    if not states:
        states = {"hidden": first}
        if run.request.retarget or run.method.trains:
            states["floats"] = first.clone()
    del first
    for i in range(done, count):
        if done and i == done:
            run.say("resumed", skeleton.blocks[i])
        with_data(run, i, states, calls).save(job.block(i))
        kept = states if i + 1 < count else {"hidden": states["hidden"]} if ends else {}
        job.keep(i + 1, kept)
    return Behind(states["hidden"], ids, calls) if ends else None

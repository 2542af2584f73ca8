"""From a directory to a quantized one, block by block: one block in memory, whatever the size of the model."""

from __future__ import annotations

import hashlib
import json
import resource
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pennyweight.errors import FormatError, InputError, NonFinite, PennyweightError
from pennyweight.llm.block import Group, Outcome, groups_of, linears, observe, rounding, solve_group
from pennyweight.llm.directory import Directory
from pennyweight.llm.estimate import estimate
from pennyweight.llm.job import Job, Part
from pennyweight.llm.methods import Method, methods, relative_loss, searched
from pennyweight.llm.schemes import Scheme, scheme_of
from pennyweight.llm.skeleton import Skeleton
from pennyweight.llm.store import Solved
from pennyweight.llm.stream import Calls, batch_size, enter
from pennyweight.llm.targets import Quantized, targets
from pennyweight.plan import fits
from pennyweight.qtensor import QTensor
from pennyweight.solvers import solvers
from pennyweight.spec import QuantSpec

Report = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Request:
    """What is wanted of a run.

    Args:
        scheme: name or spec of the blocks' linear layers, see `schemes`.
        group: inputs that share a scale.
        asymmetric: give weights a zero point.
        method: how codes are found, see `methods`.
        head: scheme of linear layers outside of the blocks; empty leaves them in float.
        embeddings: spec of tables; empty leaves them in float.
        windows: calibration windows at most.
        window: tokens of each.
        sequential: layers of a block see what the quantized layers before them in it make.
        seed: of the choice of windows.
        to: format of the result, see `targets`.
    """

    scheme: str = "w4a8"
    group: int | None = None
    asymmetric: bool = False
    method: str = "searched"
    head: str = ""
    embeddings: str = ""
    windows: int = 128
    window: int = 512
    sequential: bool = True
    seed: int = 0
    to: str = "pennyweight"


@dataclass
class Run:
    """A run under way: everything that its steps share."""

    directory: Directory
    skeleton: Skeleton
    request: Request
    scheme: Scheme
    method: Method
    report: Report
    start: float = field(default_factory=time.perf_counter)

    def say(self, what: str, site: str, **data: Any) -> None:
        """One line of progress, with the time since the start and the most memory used so far."""
        self.report({"what": what, "site": site, "seconds": round(time.perf_counter() - self.start, 1),
                     "memory": peak_memory(), **data})  # fmt: skip


def peak_memory() -> int:
    """The most bytes of memory that this process has held."""
    factor = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * factor


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
    if ids is None and (method.gram or scheme.static):
        why = f"method {request.method!r}" if method.gram else f"scheme {request.scheme!r}"
        raise InputError(f"{why} reads inputs, but there is no calibration text", hint="Give --calib.")
    skeleton = Skeleton(directory)
    _check_schemes(skeleton, scheme)
    target.check(directory, _all_schemes(skeleton, request, scheme))
    digest = None if ids is None else hashlib.sha256(ids.numpy().tobytes()).hexdigest()
    if out.parent.is_dir():
        _check_room(directory, skeleton, scheme, ids, out.parent)
    job = Job(out, {**asdict(request), "model": directory.fingerprint(), "tokens": digest,
                    "torch": torch.__version__})  # fmt: skip
    run = Run(directory, skeleton, request, scheme, method, report)
    try:
        with torch.no_grad():
            _blocks(run, job, ids)
            if not job.outer.is_file():
                _outer(run).save(job.outer)
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


def _all_schemes(skeleton: Skeleton, request: Request, scheme: Scheme) -> dict[str, Scheme]:
    found = {}
    for path, module in skeleton.model.named_modules():
        if isinstance(module, nn.Linear):
            inside = skeleton.inside(path)
            if inside or request.head:
                found[path] = scheme if inside else head_scheme(request, scheme)
        elif isinstance(module, nn.Embedding) and request.embeddings:
            found[path] = Scheme(QuantSpec.parse(request.embeddings))
    return found


def head_scheme(request: Request, scheme: Scheme) -> Scheme:
    """Scheme of the layers outside of the blocks: `same` is that of the blocks."""
    return scheme if request.head == "same" else scheme_of(request.head, request.group)


def _check_schemes(skeleton: Skeleton, scheme: Scheme) -> None:
    """Refuse a group that divides no layer's inputs before any work is done."""
    for path in skeleton.blocks:
        for name, layer in linears(skeleton.model.get_submodule(path)).items():
            try:
                scheme.weight.scale_shape((layer.out_features, layer.in_features))
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


def _blocks(run: Run, job: Job, ids: Tensor | None) -> None:
    """Every block that is not done yet."""
    skeleton, count = run.skeleton, len(run.skeleton.blocks)
    done, states = job.resume()
    streams = run.method.gram or run.scheme.static or ids is not None
    if not streams:
        for i in range(count):
            if not job.block(i).is_file():
                _one(run, i, None, None).save(job.block(i))
        return
    assert ids is not None
    if done == count:
        return
    first, calls = enter(skeleton, ids)
    hidden = states.get("hidden", first)
    del first, states
    for i in range(done, count):
        if done and i == done:
            run.say("resumed", skeleton.blocks[i])
        part = _one(run, i, hidden, calls)
        part.save(job.block(i))
        job.keep(i + 1, {"hidden": hidden} if i + 1 < count else {})


def _one(run: Run, index: int, hidden: Tensor | None, calls: Calls | None) -> Part:
    """Quantize one block, and carry the hidden states through it in place."""
    path = run.skeleton.blocks[index]
    run.skeleton.fill(path)
    block = run.skeleton.block(index)
    names = set(linears(block))
    schemes = dict.fromkeys(names, run.scheme)
    outcome = Outcome()
    if hidden is None or calls is None:
        groups = [Group([n]) for n in sorted(names)]
        for group in groups:
            _solve(run, block, group, schemes, path, outcome)
    else:
        batches = list(hidden.split(batch_size(hidden.shape[1])))

        def go(module: nn.Module, x: Tensor) -> Tensor:
            return calls.run(module, index, x)

        before = go(block, batches[0])
        groups = groups_of(block, go, batches[0][:, : hidden.shape[1]], names)
        reads = run.method.gram or run.scheme.static
        with rounding(block, schemes, outcome.layers):
            if reads and not run.request.sequential:
                for group in groups:
                    observe(block, go, batches, group, run.scheme, run.method.gram)
            for group in groups:
                if reads and run.request.sequential:
                    observe(block, go, batches, group, run.scheme, run.method.gram)
                _solve(run, block, group, schemes, path, outcome)
                group.gram = None
            after = go(block, batches[0])
            lost = float(
                ((after - before) ** 2).mean() / (before - batches[0]).pow(2).mean().clamp_min(1e-30)
            )
            for batch in batches:
                batch.copy_(go(block, batch))
        if not bool(torch.isfinite(hidden).all()):
            raise NonFinite("the block's output holds NaN or infinity", site=path)
        run.say("block", path, loss=lost, number=index + 1, count=len(run.skeleton.blocks))
    run.skeleton.empty(path)
    return Part(
        {f"{path}.{n}": layer for n, layer in outcome.layers.items()}, {},
        {f"{path}.{n}": loss for n, loss in outcome.losses.items()},
    )  # fmt: skip


def _solve(
    run: Run, block: nn.Module, group: Group, schemes: dict[str, Scheme], path: str, outcome: Outcome
) -> None:
    solve_group(block, group, schemes, run.method, path, outcome)
    for name in group.names:
        run.say("layer", f"{path}.{name}", loss=outcome.losses[name], scheme=str(schemes[name].weight))


def _outer(run: Run) -> Part:
    """Layers and tables outside of the blocks, rounded to nearest under searched ranges."""
    layers: dict[str, Solved] = {}
    losses: dict[str, float] = {}
    for name, scheme in _all_schemes(run.skeleton, run.request, run.scheme).items():
        if run.skeleton.inside(name):
            continue
        run.skeleton.fill(name, recurse=False)
        weight = run.skeleton.model.get_parameter(f"{name}.weight").detach()
        if not fits(scheme.weight, tuple(weight.shape)):
            scheme.weight.scale_shape(tuple(weight.shape))  # says what is wrong
        q: QTensor = solvers["rtn"](weight, scheme.weight, searched(scheme.weight))
        layers[name], losses[name] = Solved(scheme, q), relative_loss(weight, q, None)
        run.skeleton.empty(name, recurse=False)
        run.say("layer", name, loss=losses[name], scheme=str(scheme.weight))
    return Part(layers, {}, losses)


def request_text(request: Request) -> str:
    """A request as one line of JSON."""
    return json.dumps(asdict(request), sort_keys=True)

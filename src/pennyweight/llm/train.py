"""Training with rounded weights and activations: from a float directory and a text to a quantized directory.

The model of the directory is prepared as any network is (`training.prepare`), learns from the text and from its own
float self, and ends as the codes it computed with. With `lora` the float weights stay as they are and a product of two
narrow matrices is learned beside each, together with the scales:

    w' = Q(W + B A),   B [out, r] from zero, A [r, in],   merged before codes are made

In a process group of `torch.distributed` parameters, gradients and moments are cut among the processes: see `shards`.

Source: Hu et al. 2021, LoRA (arXiv:2106.09685), equation 3; Esser et al. 2020 (arXiv:1902.08153) for the scales.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pennyweight import pipeline
from pennyweight.errors import InputError, NonFinite
from pennyweight.llm import shards
from pennyweight.llm.directory import Directory
from pennyweight.llm.job import Part
from pennyweight.llm.load import load
from pennyweight.llm.methods import methods, relative_loss
from pennyweight.llm.quantize import check_schemes
from pennyweight.llm.request import Report, Request, Run, schemes_of
from pennyweight.llm.schemes import Scheme, bits_of, is_integer, scheme_of
from pennyweight.llm.skeleton import Skeleton
from pennyweight.llm.store import Solved
from pennyweight.llm.targets import Quantized, targets
from pennyweight.nn.linear import LinearTwin
from pennyweight.nn.ranks import agreed
from pennyweight.nn.rounding import trained
from pennyweight.passes.solve import Solve
from pennyweight.plan import Rule
from pennyweight.recipe import Recipe
from pennyweight.spec import QuantSpec
from pennyweight.training import Schedule, fit, parameter_groups, prepare

T = TypeVar("T")


@dataclass(frozen=True)
class Training:
    """What is wanted of a training.

    Args:
        scheme: of the blocks' linear layers, see `schemes`; activations int8 per token, or in float.
        group: inputs that share a scale.
        head: scheme of linear layers outside of the blocks; empty leaves them in float.
        steps: of AdamW, on a cosine to 0.
        lr: greatest learning rate.
        batch: windows of a step, of all processes together.
        window: tokens of each.
        lora: rank of what is learned beside the weights; 0 learns the weights themselves.
        distill: factor of the divergence from the float model, beside the cross entropy of the text.
        amp: compute in bfloat16 where autocast allows.
        seed: of the windows, and of A.
        to: format of the result.
    """

    scheme: str = "w4a8"
    group: int | None = None
    head: str = ""
    steps: int = 200
    lr: float = 3e-4
    batch: int = 8
    window: int = 256
    lora: int = 0
    distill: float = 1.0
    amp: bool = False
    seed: int = 0
    to: str = "pennyweight"


class Logits(nn.Module):
    """A language model as a function of ids alone. int64 [windows, length] -> [windows, length, vocabulary]."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        """See the class."""
        found: Tensor = self.model(ids, use_cache=False).logits
        return found


class LowRank(nn.Module):
    """`W + B A`, for a weight that stays as it is. [out, in] -> [out, in]."""

    def __init__(self, weight: Tensor, rank: int, seed: int) -> None:
        super().__init__()
        made = torch.Generator().manual_seed(seed)
        outputs, inputs = weight.shape
        self.a = nn.Parameter(torch.randn(rank, inputs, generator=made) / math.sqrt(inputs))
        self.b = nn.Parameter(torch.zeros(outputs, rank))

    def forward(self, weight: Tensor) -> Tensor:
        """See the class."""
        return weight + self.b @ self.a


def train(
    path: str | Path, out: str | Path, request: Training, ids: Tensor, report: Report = lambda _: None
) -> nn.Module:
    """Train a directory's model with rounding, and write the quantized result.

    The whole model is in memory, its float self beside it, and the optimizer's moments of what learns. Where several
    processes of a group call this, each keeps its share of all that, and process 0 reports and writes.

    Args:
        path: Hugging Face directory of a float decoder.
        out: folder or file to write; it appears when all is done.
        request: see there.
        ids: of the training text, int64 [n].
        report: called with one dict for every twentieth of the steps and per layer.

    Returns:
        The trained model, whose quantizers still round floats; `out` holds its codes. It is cut among processes where
        there are several: all of them must call it.

    Raises:
        InputError: on options or a model that cannot be trained, a target that exists, too short a text, and on
            processes that were given different things or that cannot share a step's windows.
        NonFinite: if the loss is.
        PennyweightError: in the other processes, of what went wrong in process 0.
        FormatError, GraphError, SpecError: see `Directory` and `Skeleton`.
        OSError: if writing fails.
    """
    directory, out, target = Directory(path), Path(out), targets[request.to]
    if directory.scheme:
        raise InputError("the model is quantized already", site=directory.path.name,
                         hint="Start from the float model.")  # fmt: skip
    shards.check(request.batch, asdict(request), ids)
    alone = shards.Alone()
    alone(partial(_check_target, out))
    alone.settle()
    plain = Request(request.scheme, request.group, head=request.head, to=request.to)
    scheme = scheme_of(request.scheme, request.group)
    skeleton = Skeleton(directory)
    schemes = schemes_of(skeleton, plain, scheme)
    _check(skeleton, request, schemes, ids)
    check_schemes(skeleton, schemes)
    target.check(directory, schemes)
    run = Run(
        directory, skeleton, plain, scheme, methods["rtn"], report if shards.rank() == 0 else lambda _: None
    )
    cut = [f"model.{path}" for path in skeleton.blocks]
    teacher = Logits(load(path)) if request.distill else None
    if teacher is not None:
        shards.shard(teacher, cut)
    student = Logits(load(path))
    for p in student.parameters():
        p.requires_grad_(request.lora == 0)
    model = prepare(student, None, _recipe(schemes), weight="lsq", input="clipped")
    pipeline.calibrate(model, [], progress=False)
    doubles = {n.removeprefix("model."): m for n, m in model.named_modules() if isinstance(m, LinearTwin)}
    if request.lora:
        for i, twin in enumerate(doubles.values()):
            narrow = LowRank(twin.weight, request.lora, request.seed + i)
            parametrize.register_parametrization(
                twin, "weight", narrow
            )  # the weight itself stays: it is frozen
    shards.shard(model, cut)
    _learn(run, model, teacher, request, ids)
    _write(run, model, doubles, schemes, out, request)
    if request.lora and shards.count() == 1:
        for twin in doubles.values():
            parametrize.remove_parametrizations(twin, "weight", leave_parametrized=True)
    return model


def _check_target(out: Path) -> None:
    if out.exists() or not out.parent.is_dir():
        raise InputError("the target exists already, or its folder does not", site=out.name)


def _check(skeleton: Skeleton, request: Training, schemes: dict[str, Scheme], ids: Tensor) -> None:
    if not getattr(skeleton.model, "can_generate", bool)():
        raise InputError("only models that predict the next token are trained",
                         site=type(skeleton.model).__name__)  # fmt: skip
    for name, scheme in schemes.items():
        if scheme.static or not is_integer(scheme.weight) or isinstance(scheme.weight.scale, QuantSpec):
            raise InputError("scales of integers are learned, activations ranged at run time or in float",
                             site=name, spec=str(scheme), hint="w4a8, w8a8, w4a16 and the like.")  # fmt: skip
        if scheme.input is not None and bits_of(scheme.input) != 8:
            raise InputError(
                "activations of other than 8 bits are not trained for", site=name, spec=str(scheme)
            )
    if len(ids) < request.window + 1:
        raise InputError(f"the text has {len(ids)} tokens, one window needs {request.window + 1}",
                         hint="Give more text, or a smaller --window.")  # fmt: skip
    if request.lora < 0 or request.steps < 1 or request.batch < 1 or not request.lr > 0:
        raise InputError(
            f"lora {request.lora}, {request.steps} steps of {request.batch} windows, lr {request.lr}"
        )


def _recipe(schemes: dict[str, Scheme]) -> Recipe:
    """A rule for every layer."""
    rules = tuple(
        Rule(f"model.{n}", ("Linear",), s.weight, s.input, dynamic=s.input is not None)
        for n, s in schemes.items()
    )
    return Recipe("train", rules, (Solve("rtn", "mse"),))


def _batches(ids: Tensor, request: Training) -> Callable[[], Iterator[tuple[Tensor, Tensor]]]:
    """Random windows of the text and the tokens that follow, [batch, window] each; of these, this process's rows."""

    def made() -> Iterator[tuple[Tensor, Tensor]]:
        draw, own = torch.Generator().manual_seed(request.seed), shards.rows(request.batch)
        for _ in range(request.steps):
            starts = torch.randint(len(ids) - request.window, (request.batch,), generator=draw).tolist()
            rows = torch.stack([ids[s : s + request.window + 1] for s in starts[own]])
            yield rows[:, :-1], rows[:, 1:]

    return made


def _learn(run: Run, model: nn.Module, teacher: nn.Module | None, request: Training, ids: Tensor) -> None:
    seen: list[float] = []
    every = max(1, request.steps // 20)

    def next_token(y: Tensor, target: Tensor) -> Tensor:
        value = F.cross_entropy(y.flatten(0, 1), target.flatten())
        seen.append(float(agreed(value.detach(), "mean")))
        if not math.isfinite(seen[-1]):  # in all processes alike: none may wait for another
            raise NonFinite(
                f"the loss is {seen[-1]} at step {len(seen) - 1}", hint="Lower the learning rate."
            )
        if len(seen) % every == 0:
            run.say("trained", "", loss=sum(seen[-every:]) / every, number=len(seen), count=request.steps)
        return value

    groups = parameter_groups(model, request.lr, 0.01, quantizer_lr=request.lr)
    optimizer = torch.optim.AdamW(groups, request.lr, (0.9, 0.95))
    with torch.enable_grad():
        fit(
            model, _batches(ids, request), steps_per_epoch=request.steps, lr=request.lr, loss=next_token,
            teacher=teacher, distill=request.distill, optimizer=optimizer,
            schedule=Schedule(), amp=request.amp, reestimate=0, progress=False,
        )  # fmt: skip


def _write(
    run: Run, model: nn.Module, doubles: dict[str, LinearTwin], schemes: dict[str, Scheme], out: Path,
    request: Training,
) -> None:  # fmt: skip
    """Parts of the trained model, block by block, and the target made of them."""
    folder = out.parent / f".{out.name}.partial"
    files = []
    alone = shards.Alone()
    try:
        alone(partial(_fresh, folder))
        for i, lead in enumerate([*run.skeleton.blocks, ""]):
            files.append(folder / f"part-{i:05}.safetensors")
            with shards.whole(model.get_submodule(f"model.{lead}") if lead else model):
                alone(partial(_save_part, run, model, doubles, schemes, lead, files[-1], not request.lora))
        alone(partial(_finish, run, files, request, out))
        alone.settle()
    finally:
        if shards.rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)
    run.say("done", out.name)


def _fresh(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()


def _save_part(
    run: Run, model: nn.Module, doubles: dict[str, LinearTwin], schemes: dict[str, Scheme], lead: str, file: Path,
    floats: bool,
) -> None:  # fmt: skip
    """Codes of the layers under a path, and the floats that were trained there."""
    skeleton = run.skeleton
    layers, losses = {}, {}
    for name, twin in _under(lead, skeleton, doubles).items():
        weight = twin.weight.detach()
        q = trained(twin)["weight"].codes(weight)
        layers[name], losses[name] = Solved(schemes[name], q), relative_loss(weight, q, None)
        run.say("layer", name, loss=losses[name], scheme=str(schemes[name].weight))
    kept = {}
    if floats:
        wanted = {n for n, _ in skeleton.model.named_parameters() if n.removesuffix(".weight") not in doubles}
        given = dict(model.named_parameters(remove_duplicate=False))
        found = {n: given[f"model.{n}"] for n in sorted(wanted) if f"model.{n}" in given}
        kept = {n: p.detach().float() for n, p in _under(lead, skeleton, found).items()}
        kept |= {n: kept[n].T.contiguous() for n in skeleton.turned & set(kept)}
    Part(layers, kept, losses).save(file)


def _finish(run: Run, files: list[Path], request: Training, out: Path) -> None:
    made = files[0].parent / "result"
    targets[request.to].write(Quantized(run.directory, run.skeleton, files, asdict(request)), made)
    made.replace(out)


def _under(lead: str, skeleton: Skeleton, table: dict[str, T]) -> dict[str, T]:
    """What belongs to a block; with an empty lead, to none."""
    return {n: v for n, v in table.items() if (n.startswith(f"{lead}.") if lead else not skeleton.inside(n))}

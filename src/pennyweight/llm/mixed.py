"""Which layer gets how many bits: measured damage, an exact choice.

What a layer's rounding does to the loss is its error at the layer's output, weighed by how much the loss moves there:

    damage = 1/2 sum_o E[g_o^2] (D H D^T)_oo,   D = W - W',  H = E[x x^T],  g = dL / dy

with the gradients of the float network's own loss (of the next token for decoders; of a random projection of the
result for others). One sweep forward keeps what enters each block on the disk, one backward takes the blocks in reverse
order: one block in memory, as everywhere. Damages add up, so the choice of widths under an average is a knapsack, which
`tune.allocate` solves exactly.
Source: Kunstner et al. 2019 (arXiv:1905.12558) on empirical Fisher matrices; a diagonal one over outputs stands here.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pennyweight.errors import GraphError, InputError
from pennyweight.llm.block import Streams, groups_of, linears, observe
from pennyweight.llm.directory import Directory
from pennyweight.llm.evaluate import perplexity
from pennyweight.llm.load import load
from pennyweight.llm.methods import Problem, methods
from pennyweight.llm.request import Report, Request, Run
from pennyweight.llm.schemes import Scheme, scheme_of
from pennyweight.llm.skeleton import Skeleton
from pennyweight.llm.stream import Calls, batch_size, carried, enter, load_states, save_states
from pennyweight.llm.targets import targets
from pennyweight.tune.allocate import Choice, solve

WIDTHS = (2, 3, 4, 8)
WINDOWS = 16  # of the calibration text at most, for the two sweeps
_NAME = re.compile(r"w([2345678])a(4|8|16)")


def widths(directory: Directory, request: Request) -> dict[int, Scheme]:
    """The schemes to choose from, by bits: the request's with other weights, those that the target can hold.

    Raises:
        InputError: for schemes that are not named by bits, or calibrated, and targets that hold fewer than two widths.
    """
    match = _NAME.fullmatch(request.scheme)
    if match is None:
        raise InputError(
            f"bits can be chosen layer by layer for schemes named by bits, not {request.scheme!r}",
            hint="w4a8 or w4a16 say the activations; the bits of the weights are then chosen.",
        )
    group = 32 if request.group is None else request.group  # of 8 bits too: layers differ in bits alone
    target, found = targets[request.to], {}
    for bits in WIDTHS:
        scheme = scheme_of(f"w{bits}a{match[2]}", group, asymmetric=request.asymmetric)
        with suppress(InputError):  # another width may do
            target.check(directory, {"": scheme})
            found[bits] = scheme
    if len(found) < 2:
        raise InputError(f"{request.to} files hold {len(found)} of the widths {WIDTHS}", spec=request.scheme,
                         hint="--to pennyweight holds all.")  # fmt: skip
    return found


class Damages:
    """What each width does to each layer of the blocks.

    Attributes:
        found: damage by layer and bits, in nats a token for decoders.
        sizes: weights of each layer.
        schemes: by bits.
    """

    def __init__(self, run: Run, schemes: dict[int, Scheme]) -> None:
        self.run, self.schemes = run, schemes
        self.found: dict[str, dict[int, float]] = {}
        self.sizes: dict[str, int] = {}

    def choose(self, bits: float) -> dict[str, int]:
        """Bits of every layer, of least damage among those whose average over all weights is at most `bits`.

        Raises:
            InputError: if no choice is that small.
            SolverError: without scipy.
        """
        names = list(self.found)
        groups = [
            [
                Choice(str(b), damage, {"bits": float(b * self.sizes[n])})
                for b, damage in self.found[n].items()
            ]
            for n in names
        ]
        limit = bits * sum(self.sizes.values())
        found = solve(groups, minimize="damage", limits={"bits": limit})
        if found is None:
            raise InputError(
                f"no choice of widths has {bits} bits on average",
                hint=f"At least {min(self.schemes)}.",
            )
        return {n: int(groups[i][c].form) for i, (n, c) in enumerate(zip(names, found, strict=True))}

    def average(self, chosen: dict[str, int]) -> float:
        """Bits of a code, averaged over all weights."""
        return sum(b * self.sizes[n] for n, b in chosen.items()) / sum(self.sizes.values())

    def say(self, chosen: dict[str, int], **data: float) -> None:
        """Report a choice."""
        counts = {str(b): sum(c == b for c in chosen.values()) for b in self.schemes}
        damage = sum(self.found[n][b] for n, b in chosen.items())
        self.run.say("chosen", "", bits=self.average(chosen), layers=counts, damage=damage, **data)

    def request(self, request: Request, chosen: dict[str, int]) -> Request:
        """The request with a scheme for every layer."""
        return replace(request, layers=tuple((n, str(self.schemes[b])) for n, b in chosen.items()))


def damages(path: str | Path, request: Request, ids: Tensor, folder: Path, report: Report) -> Damages:
    """Measure what each width does to each layer.

    Args:
        path: directory of the float model.
        request: its scheme, group and seed are read.
        ids: calibration windows, int64 [windows, length]; the first are used.
        folder: where hidden states may be kept meanwhile.
        report: called with one dict per block.

    Raises:
        InputError: see `widths`.
        GraphError: if the result of the model does not depend on its blocks.
    """
    directory = Directory(path)
    skeleton = Skeleton(directory)
    schemes = widths(directory, request)
    run = Run(directory, skeleton, request, next(iter(schemes.values())), methods["searched"], report)
    found = Damages(run, schemes)
    ids = ids[:WINDOWS]
    with tempfile.TemporaryDirectory(dir=folder, prefix=".damages-") as kept, torch.no_grad():
        hidden, calls = enter(skeleton, ids)
        size = batch_size(ids.shape[1])
        for i, name in enumerate(skeleton.blocks):
            save_states(Path(kept) / f"{i}", i, {"hidden": hidden})
            skeleton.fill(name)
            for batch in hidden.split(size):
                batch.copy_(calls.run(skeleton.block(i), i, batch))
            skeleton.empty(name)
        slope = _last_slope(skeleton, calls, ids, hidden, request.seed)
        for i in reversed(range(len(skeleton.blocks))):
            _, states = load_states(Path(kept) / f"{i}")
            slope = _block(run, found, i, states["hidden"], slope, calls)
            run.say(
                "measured", skeleton.blocks[i], number=len(skeleton.blocks) - i, count=len(skeleton.blocks)
            )
    found.found = {n: found.found[n] for n in sorted(found.found)}
    return found


def _last_slope(skeleton: Skeleton, calls: Calls, ids: Tensor, hidden: Tensor, seed: int) -> Tensor:
    """The gradient of the summed loss by the hidden states behind the last block, [windows, length, width]."""
    parts, drawn = [], torch.Generator().manual_seed(seed)
    size = batch_size(ids.shape[1])
    speaks = bool(getattr(skeleton.model, "can_generate", bool)())
    with torch.enable_grad(), skeleton.on_demand():
        for part, x in zip(ids.split(size), hidden.split(size), strict=True):
            leaf = x.detach().clone().requires_grad_()
            wanted = part if speaks else None
            loss = carried(skeleton, calls, part, leaf, partial(_loss, ids=wanted, drawn=drawn))
            if not loss.requires_grad:
                raise GraphError("the model's result does not depend on its blocks", site=skeleton.path)
            parts.append(torch.autograd.grad(loss, leaf)[0])
    return torch.cat(parts)


def _loss(result: Any, ids: Tensor | None, drawn: torch.Generator) -> Tensor:
    """Summed cross entropy of the next token, or without ids a random projection of what comes out."""
    y = getattr(result, "logits", None)
    if ids is not None and isinstance(y, Tensor):
        return F.cross_entropy(y[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    y = next(v for v in tree_leaves(dict(result)) if isinstance(v, Tensor) and v.requires_grad)
    return (y * torch.randn(y.shape, generator=drawn)).sum()


def _block(run: Run, found: Damages, index: int, hidden: Tensor, slope: Tensor, calls: Calls) -> Tensor:
    """Damages of a block's layers; returns the gradient by what enters the block."""
    path = run.skeleton.blocks[index]
    run.skeleton.fill(path)
    block = run.skeleton.block(index)
    names = set(linears(block))

    def go(module: nn.Module, x: Tensor) -> Tensor:
        return calls.run(module, index, x)

    batches = list(hidden.split(batch_size(hidden.shape[1])))
    groups = groups_of(block, go, batches[0][:1], names)
    observe(
        block, Streams(go, batches), groups, dict.fromkeys(names, next(iter(found.schemes.values()))), True
    )
    slopes: dict[str, Tensor] = {}
    before, tokens = [], 0
    with _squares(block, names, slopes):
        for x, g in zip(batches, slope.split(len(batches[0])), strict=True):
            with torch.enable_grad():
                leaf = x.detach().clone().requires_grad_()
                before.append(torch.autograd.grad(go(block, leaf), leaf, g)[0])
            tokens += x.shape[0] * x.shape[1]
    for group in groups:
        for name in group.names:
            weight = block.get_submodule(name).get_parameter("weight").detach()
            weigh = slopes.get(name, torch.zeros(len(weight))) / tokens
            found.sizes[f"{path}.{name}"] = weight.numel()
            found.found[f"{path}.{name}"] = {
                b: _damage(weight, scheme, group.gram, weigh) for b, scheme in found.schemes.items()
            }
        group.forget()
    run.skeleton.empty(path)
    return torch.cat(before)


def _damage(weight: Tensor, scheme: Scheme, gram: Tensor | None, weigh: Tensor) -> float:
    """See the module. Shapes: weight [out, in], gram [in, in], weigh [out]."""
    error = weight - methods["searched"].solve(Problem(weight, scheme.weight)).dequantize()
    if gram is None:  # no token reached it
        return 0.0
    return float(0.5 * (weigh * torch.einsum("oi,oi->o", error @ gram, error)).sum())


@contextmanager
def _squares(block: nn.Module, names: Iterable[str], slopes: dict[str, Tensor]) -> Iterator[None]:
    """While the block runs and its gradients are taken: sums of squared gradients of each layer's outputs, [out]."""

    def hook(name: str) -> Callable[..., None]:
        def seen(gradient: Tensor) -> None:
            part = gradient.detach().reshape(-1, gradient.shape[-1]).pow(2).sum(0)
            slopes[name] = slopes[name] + part if name in slopes else part

        def look(module: nn.Module, args: object, y: Tensor) -> None:
            if y.requires_grad:
                y.register_hook(seen)

        return look

    handles = [block.get_submodule(n).register_forward_hook(hook(n)) for n in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def to_bits(
    path: str | Path,
    out: str | Path,
    request: Request,
    bits: float,
    ids: Tensor,
    report: Report = lambda _: None,
) -> Request:
    """The request with a scheme for every layer, whose codes have `bits` bits on average at most.

    Args:
        path: directory of the float model.
        out: where the result will stand; hidden states are kept beside it meanwhile.
        request: see there.
        bits: from 2 to 8.
        ids: calibration windows, int64 [windows, length].
        report: called with one dict per block, and one with what was chosen.

    Raises:
        InputError: on bits that cannot be met, and see `widths`.
    """
    found = damages(path, request, ids, Path(out).parent, report)
    chosen = found.choose(bits)
    found.say(chosen)
    return found.request(request, chosen)


def to_perplexity(
    path: str | Path, out: str | Path, request: Request, percent: float, ids: Tensor, text: Tensor,
    report: Report = lambda _: None, *, tries: int = 5, limit: int = 0,
) -> Request:  # fmt: skip
    """The request with a scheme for every layer, of the fewest bits whose perplexity is at most so much worse.

    Averages between 2 and 8 bits are halved `tries` times; each is quantized as the request says and measured.

    Args:
        path: directory of the float model.
        out: where the result will stand; trials stand beside it meanwhile.
        request: see there.
        percent: greatest loss of perplexity against the float model.
        ids: calibration windows, int64 [windows, length].
        text: to measure on, int64 [n], in windows of the request's length.
        report: called with one dict per block and trial.
        tries: trials after that of 8 bits.
        limit: windows of the text at most; 0 for all.

    Raises:
        InputError: if 8 bits lose more, and see `widths`.
    """
    from pennyweight.llm.quantize import quantize

    out = Path(out)
    base = perplexity(load(path), text, request.window, limit=limit).value
    found = damages(path, request, ids, out.parent, report)

    def trial(bits: float) -> tuple[dict[str, int], float]:
        chosen = found.choose(bits)
        place = Path(tempfile.mkdtemp(dir=out.parent, prefix=".trial-"))
        try:
            quantize(path, place / "model", replace(found.request(request, chosen), to="pennyweight"), ids)
            loss = 100 * (
                perplexity(load(place / "model"), text, request.window, limit=limit).value / base - 1
            )
        finally:
            shutil.rmtree(place)
        found.say(chosen, loss=loss)
        return chosen, loss

    low, high = float(min(found.schemes)), float(max(found.schemes))
    best, loss = trial(high)
    if loss > percent:
        raise InputError(
            f"{high:.0f} bits lose {loss:.2f} % of perplexity, which is more than {percent} %",
            hint="Allow more, or try --method gptq, --rotate or smaller groups.",
        )
    for _ in range(tries):
        middle = (low + high) / 2
        chosen, loss = trial(middle)
        if loss <= percent:
            best, high = chosen, found.average(chosen)
        else:
            low = middle
    return found.request(request, best)

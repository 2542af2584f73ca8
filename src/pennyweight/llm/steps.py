"""The steps of a run: a block without data, a block with them, and what is outside of the blocks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from pennyweight.errors import GraphError, NonFinite
from pennyweight.llm.autoround import Training, autoround
from pennyweight.llm.block import (
    Group,
    Outcome,
    Streams,
    groups_of,
    linears,
    observe,
    round_tokens,
    rounding,
    solve_group,
)
from pennyweight.llm.job import Part
from pennyweight.llm.memory import give_back
from pennyweight.llm.methods import Problem, extremes, relative_loss, searched
from pennyweight.llm.online import turn_inputs
from pennyweight.llm.request import Run
from pennyweight.llm.rotate import rotate_block, turned
from pennyweight.llm.scaling import scale_inputs
from pennyweight.llm.schemes import Scheme
from pennyweight.llm.skeleton import put_module
from pennyweight.llm.store import Solved
from pennyweight.llm.stream import Calls, batch_size, carried, enter
from pennyweight.qtensor import QTensor
from pennyweight.solvers import solvers


def no_data(run: Run, index: int) -> Part:
    """Quantize one block, layer by layer."""
    path = run.skeleton.blocks[index]
    run.skeleton.fill(path)
    block, outcome = run.skeleton.block(index), Outcome()
    names = sorted(linears(block))
    for name in names:
        _solve(run, block, Group([name]), run.inside(path), path, outcome)
    run.skeleton.empty(path)
    return _part(path, outcome, {})


def with_data(run: Run, index: int, states: dict[str, Tensor], calls: Calls) -> Part:
    """Quantize one block on what reaches it, and carry the hidden states through it in place.

    Raises:
        NonFinite: if the block's output is NaN or infinite.
        GraphError: if the hidden states cannot be rotated.
    """
    path, request = run.skeleton.blocks[index], run.request
    run.skeleton.fill(path)
    block = run.skeleton.block(index)
    given = {n: p for n, p in block.named_parameters() if n.removesuffix(".weight") not in linears(block)}

    def go(module: nn.Module, x: Tensor) -> Tensor:
        return calls.run(module, index, x)

    size = batch_size(states["hidden"].shape[1])
    batches = list(states["hidden"].split(size))
    floats = list(states["floats"].split(size)) if "floats" in states else None
    if run.turn is not None:
        rotate_block(block, go, turned(batches[0][:1], run.turn.T), run.turn)
    replaced = turn_inputs(block, go, batches[0][:1]) if request.hadamard else {}
    schemes = run.inside(path)
    groups = groups_of(block, go, batches[0][:1], set(schemes))
    streams = Streams(go, batches, floats)
    scaling = request.smooth > 0 or request.awq or run.method.awq
    outcome = Outcome()
    if scaling:
        awq = request.awq or run.method.awq
        observe(block, streams, groups, schemes, awq)
        absorbed = scale_inputs(block, streams, groups, schemes, smooth=request.smooth, awq=awq)
        run.say("scaled", path, absorbed=absorbed)
    if floats is not None:
        streams.float_block = copy.deepcopy(block)
    changed = {n: p.detach() for n, p in block.named_parameters() if n in given and p is not given[n]}
    biases = {n for n in changed if n.endswith(".bias")}
    before = go(block, batches[0])
    reads = run.method.gram or run.scheme.static
    names = schemes if run.method.trains else ()
    weights = {n: block.get_submodule(n).get_parameter("weight").detach() for n in names}
    seen = streams if request.retarget else Streams(go, batches)
    with rounding(block, schemes, outcome.layers):
        if reads and not request.sequential:
            observe(block, seen, groups, schemes, run.method.gram)
        for group in groups:
            if reads and request.sequential:
                give_back()
                observe(block, seen, [group], schemes, run.method.gram)
            give_back()
            _solve(run, block, group, schemes, path, outcome)
            group.forget()
        give_back()
    if run.method.trains:
        _train(run, block, weights, streams, schemes, path, outcome)
    with rounding(block, schemes, outcome.layers):
        after = go(block, batches[0])
        lost = float((after - before).pow(2).mean() / (before - batches[0]).pow(2).mean().clamp_min(1e-30))
        for i, batch in enumerate(batches):
            batch.copy_(go(block, batch))
            if floats is not None and streams.float_block is not None:
                floats[i].copy_(go(streams.float_block, floats[i]))
    if not bool(torch.isfinite(states["hidden"]).all()):
        raise NonFinite("the block's output holds NaN or infinity", site=path)
    run.say("block", path, loss=lost, number=index + 1, count=len(run.skeleton.blocks))
    for name, layer in replaced.items():
        put_module(block, name, layer)
    run.skeleton.empty(path)
    return _part(path, outcome, {n: changed[n] for n in sorted({*changed} | biases)})


def _part(path: str, outcome: Outcome, floats: dict[str, Tensor]) -> Part:
    return Part(
        {f"{path}.{n}": layer for n, layer in outcome.layers.items()},
        {f"{path}.{n}": tensor for n, tensor in floats.items()},
        {f"{path}.{n}": loss for n, loss in outcome.losses.items()},
    )


def _solve(
    run: Run, block: nn.Module, group: Group, schemes: dict[str, Scheme], path: str, outcome: Outcome
) -> None:
    solve_group(block, group, schemes, run.method, path, outcome)
    for name in group.names if not run.method.trains else []:
        run.say("layer", f"{path}.{name}", loss=outcome.losses[name], scheme=str(schemes[name].weight))


def _train(
    run: Run, block: nn.Module, weights: dict[str, Tensor], streams: Streams, schemes: dict[str, Scheme], path: str,
    outcome: Outcome,
) -> None:  # fmt: skip
    """All layers of the block together, from what was solved, toward what the float block makes of the float stream."""
    for name, weight in weights.items():
        block.get_submodule(name)._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
    assert streams.floats is not None
    assert streams.float_block is not None
    targets = torch.cat([streams.run(streams.float_block, x) for x in streams.floats])
    training = Training(run.request.steps, rate=run.request.rate, seed=run.request.seed)
    found, before, after = autoround(block, streams, outcome.layers, schemes, targets, training)
    run.say("trained", path, loss=after, before=before)
    for name, q in found.items():
        layer = block.get_submodule(name)
        outcome.losses[name] = relative_loss(weights[name], q, None)
        outcome.layers[name] = replace(outcome.layers[name], weight=q)
        layer._parameters["weight"] = nn.Parameter(q.dequantize(), requires_grad=False)
        run.say("layer", f"{path}.{name}", loss=outcome.losses[name], scheme=str(schemes[name].weight))


@dataclass
class Behind:
    """What is behind the last block.

    Attributes:
        hidden: [windows, length, width].
        ids: that it came from, int64 [windows, length].
        calls: how blocks are called.
    """

    hidden: Tensor
    ids: Tensor
    calls: Calls


def solves_ends(run: Run) -> bool:
    """Whether layers outside of the blocks are solved on what they read. Rotated, they are rounded to nearest."""
    skeleton = run.skeleton
    ends = (skeleton.model.get_submodule(n) for n in run.schemes if not skeleton.inside(n))
    return run.method.gram and run.turn is None and any(isinstance(m, nn.Linear) for m in ends)


def end_grams(run: Run, behind: Behind) -> dict[str, Tensor]:
    """Second moments of what linear layers outside of the blocks read, [in, in], by path; of those that run."""
    skeleton = run.skeleton
    found: dict[str, Tensor] = {}
    tokens: dict[str, int] = {}
    handles = []

    def hook(name: str) -> Callable[..., None]:
        def look(module: nn.Module, args: tuple[Tensor]) -> None:
            x = round_tokens(args[0].reshape(-1, args[0].shape[-1]).float(), run.schemes[name])
            found[name] = found[name].addmm_(x.T, x) if name in found else x.T @ x
            tokens[name] = tokens.get(name, 0) + len(x)

        return look

    for name in run.schemes:
        module = skeleton.model.get_submodule(name)
        if not skeleton.inside(name) and isinstance(module, nn.Linear):
            handles.append(module.register_forward_pre_hook(hook(name)))
    size = batch_size(behind.ids.shape[1])
    try:
        with torch.no_grad(), skeleton.on_demand():
            for ids, hidden in zip(behind.ids.split(size), behind.hidden.split(size), strict=True):
                carried(skeleton, behind.calls, ids, hidden, lambda result: None)
    finally:
        for handle in handles:
            handle.remove()
    return {n: h / tokens[n] for n, h in found.items()}


def outer(run: Run, behind: Behind | None = None) -> Part:
    """Layers and tables outside of the blocks, rounded to nearest: searched ranges, extremes for `rtn`.

    Linear layers whose inputs are given are solved as those of the blocks are.

    Raises:
        SpecError: if a spec does not fit a table.
    """
    layers: dict[str, Solved] = {}
    losses: dict[str, float] = {}
    floats = {} if run.turn is None else _rotated_ends(run, run.turn)
    grams = {} if behind is None else end_grams(run, behind)
    for name, scheme in run.schemes.items():
        if run.skeleton.inside(name):
            continue
        weight = floats.pop(f"{name}.weight", None)
        if weight is None:
            run.skeleton.fill(name, recurse=False)
            weight = run.skeleton.model.get_parameter(f"{name}.weight").detach()
            run.skeleton.empty(name, recurse=False)
        rule = extremes(scheme.weight) if run.request.method == "rtn" else searched(scheme.weight)
        gram = grams.get(name)
        q: QTensor = (
            solvers["rtn"](weight, scheme.weight, rule)
            if gram is None
            else run.method.solve(Problem(weight, scheme.weight, gram))
        )
        layers[name], losses[name] = Solved(scheme, q), relative_loss(weight, q, gram)
        run.say("layer", name, loss=losses[name], scheme=str(scheme.weight))
    return Part(layers, floats, losses)


def _rotated_ends(run: Run, q: Tensor) -> dict[str, Tensor]:
    """Tables, last norm and output layer for rotated hidden states, by name.

    Raises:
        GraphError: if no norm is before the output layer.
    """
    skeleton, model = run.skeleton, run.skeleton.model
    tail: dict[str, Any] = {}
    handles = []

    def after(path: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: object, y: object) -> None:
            if isinstance(y, Tensor):
                tail[path] = y

        return keep

    def before(path: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: tuple[Tensor]) -> None:
            tail[path] = args[0]

        return keep

    heads = [p for p, m in model.named_modules() if isinstance(m, nn.Linear) and not skeleton.inside(p)]
    for path, module in model.named_modules():
        if skeleton.inside(path) or module._parameters.get("weight") is None:
            continue
        if path in heads:
            handles.append(module.register_forward_pre_hook(before(path)))
        elif module.get_parameter("weight").ndim == 1:
            handles.append(module.register_forward_hook(after(path)))
    try:
        enter(skeleton, torch.zeros(1, 4, dtype=torch.int64), through=True)
    finally:
        for handle in handles:
            handle.remove()
    found: dict[str, Tensor] = {}

    def stored(name: str) -> Tensor:
        own = skeleton.stored(name)
        return skeleton.directory.floats([own])[own].double()

    for head in heads:
        norms = [
            p for p, y in tail.items()
            if p not in heads and head in tail and y.data_ptr() == tail[head].data_ptr()
        ]  # fmt: skip
        if not norms:
            raise GraphError("no norm is before the output layer", site=head, hint="Leave --rotate out.")
        gain = stored(f"{norms[0]}.weight")
        found[f"{norms[0]}.weight"] = torch.ones_like(gain).float()
        found[f"{head}.weight"] = ((stored(f"{head}.weight") * gain) @ q).float()
    for path, module in model.named_modules():
        if isinstance(module, nn.Embedding) and module.embedding_dim == len(q):
            found[f"{path}.weight"] = (stored(f"{path}.weight") @ q).float()
    return found

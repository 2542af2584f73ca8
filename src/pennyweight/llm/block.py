"""One block: who shares which inputs, what these inputs are, and layer after layer quantized."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from pennyweight.errors import PennyweightError
from pennyweight.formats import grids
from pennyweight.formats.integer import Integer
from pennyweight.llm.methods import Method, Problem, relative_loss
from pennyweight.llm.schemes import Scheme
from pennyweight.llm.store import Solved
from pennyweight.ranges import TINY, params_of_range

Run = Callable[
    [nn.Module, Tensor], Tensor
]  # a block and hidden states [windows, length, width] to its result


@dataclass
class Group:
    """Linear layers of a block that read one and the same tensor, by their paths inside of the block."""

    names: list[str]
    gram: Tensor | None = None
    cross: Tensor | None = None
    low: float = 0.0
    high: float = 0.0
    tokens: int = 0


@dataclass
class Outcome:
    """What became of a block's layers.

    Attributes:
        layers: by path inside of the block.
        losses: share of each layer's output energy that is lost.
    """

    layers: dict[str, Solved] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)


def linears(block: nn.Module) -> dict[str, nn.Linear]:
    """Linear layers by path."""
    return {path: m for path, m in block.named_modules() if isinstance(m, nn.Linear)}


def round_tokens(x: Tensor, scheme: Scheme, params: Tensor | None = None) -> Tensor:
    """Activations as the scheme rounds them: per token at run time, or with calibrated scale and zero point [2].

    x: [..., n] float; the same back. `x' = (clamp(rint(x r) + z, 0, 2^b - 1) - z) s`.
    """
    if scheme.input is None:
        return x
    grid = grids[scheme.input.grid]
    assert isinstance(grid, Integer)
    top = float(grid.qmax - grid.qmin)
    if scheme.static:
        if params is None:
            return x
        scale, zero = params[0], params[1]
    else:
        lo, hi = torch.aminmax(x, dim=-1, keepdim=True) if not scheme.input.per_tensor else torch.aminmax(x)
        lo, hi = lo.clamp(max=0.0), hi.clamp(min=0.0)
        scale = (hi - lo) * (1.0 / top)
        scale = torch.where(scale < TINY, torch.ones_like(scale), scale)
        zero = torch.round(-lo * (1.0 / scale)).clamp(0.0, top)
    return (torch.clamp(torch.round(x * (1.0 / scale)) + zero, 0.0, top) - zero) * scale


@contextmanager
def rounding(block: nn.Module, schemes: dict[str, Scheme], solved: dict[str, Solved]) -> Iterator[None]:
    """Round the inputs of layers while the block runs."""
    handles = []

    def hook(name: str) -> Callable[..., tuple[Tensor]]:
        def rounded(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
            known = solved.get(name)
            return (round_tokens(args[0], schemes[name], None if known is None else known.input),)

        return rounded

    for name, scheme in schemes.items():
        if scheme.input is not None:
            handles.append(block.get_submodule(name).register_forward_pre_hook(hook(name)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def groups_of(block: nn.Module, run: Run, hidden: Tensor, names: set[str]) -> list[Group]:
    """Layers by the tensor they read, in the order they run; those that do not run come last, each alone."""
    seen: list[tuple[Tensor, Group]] = []
    handles = []

    def hook(name: str) -> Callable[..., None]:
        def look(module: nn.Module, args: tuple[Tensor]) -> None:
            for tensor, group in seen:
                if tensor is args[0]:
                    group.names += [] if name in group.names else [name]
                    return
            seen.append((args[0], Group([name])))

        return look

    for name in names:
        handles.append(block.get_submodule(name).register_forward_pre_hook(hook(name)))
    try:
        with torch.no_grad():
            run(block, hidden)
    finally:
        for handle in handles:
            handle.remove()
    found: list[Group] = []
    taken: set[str] = set()
    for _, group in seen:
        group.names = sorted(n for n in group.names if n not in taken)
        taken |= set(group.names)
        found += [group] if group.names else []
    return found + [Group([n]) for n in sorted(names - taken)]


def observe(
    block: nn.Module, run: Run, batches: list[Tensor], group: Group, scheme: Scheme, gram: bool
) -> None:
    """Fill a group's second moments and extremes from what its first layer reads."""
    total: Tensor | None = None
    group.tokens, group.low, group.high = 0, 0.0, 0.0

    def look(module: nn.Module, args: tuple[Tensor]) -> None:
        nonlocal total
        x = args[0].reshape(-1, args[0].shape[-1])
        group.low, group.high = min(group.low, float(x.min())), max(group.high, float(x.max()))
        group.tokens += len(x)
        if gram:
            x = round_tokens(x, scheme)
            total = x.T @ x if total is None else total.addmm_(x.T, x)

    handle = block.get_submodule(group.names[0]).register_forward_pre_hook(look, prepend=True)
    try:
        with torch.no_grad():
            for hidden in batches:
                run(block, hidden)
    finally:
        handle.remove()
    if total is not None and group.tokens:
        group.gram = total.div_(group.tokens)


def solve_group(
    block: nn.Module, group: Group, schemes: dict[str, Scheme], method: Method, site: str, outcome: Outcome
) -> None:
    """Find the codes of a group's layers, and let the block compute with them.

    Raises:
        PennyweightError: of the solver, with the layer's path.
    """
    for name in group.names:
        layer, scheme = block.get_submodule(name), schemes[name]
        assert isinstance(layer, nn.Linear)
        weight = layer.weight.detach()
        try:
            q = method.solve(Problem(weight, scheme.weight, group.gram, group.cross))
        except PennyweightError as error:
            path = error.site or f"{site}.{name}"
            raise type(error)(
                error.what, site=path, spec=error.spec, shapes=error.shapes, hint=error.hint
            ) from error
        params = None
        if scheme.static and scheme.input is not None:
            ends = params_of_range(torch.tensor(group.low), torch.tensor(group.high), scheme.input)
            assert ends.zero is not None
            params = torch.stack([ends.scale, ends.zero])
        outcome.losses[name] = relative_loss(weight, q, group.gram)
        outcome.layers[name] = Solved(scheme, q, params)
        layer.weight = nn.Parameter(q.dequantize(), requires_grad=False)

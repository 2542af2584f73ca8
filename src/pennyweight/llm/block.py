"""One block: who shares which inputs, what these inputs are, and layer after layer quantized."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from pennyweight.errors import PennyweightError
from pennyweight.formats import grids
from pennyweight.formats.integer import Integer
from pennyweight.llm.methods import Method, Problem, relative_loss
from pennyweight.llm.schemes import Scheme
from pennyweight.llm.store import Solved
from pennyweight.ranges import TINY
from pennyweight.ranges.mse import MSE
from pennyweight.stats.histogram import Histogram

Run = Callable[
    [nn.Module, Tensor], Tensor
]  # a block and hidden states [windows, length, width] to its result


@dataclass
class Group:
    """Linear layers of a block that read one and the same tensor, by their paths inside of the block.

    Attributes:
        names: of the layers.
        gram: mean of `x x^T`, float32 [in, in], once observed.
        cross: mean of `x~ x^T` with the inputs x~ of the float network, or None.
        low: least value of each input, [in]; zero is among the values.
        high: greatest value of each input, [in].
        values: of all inputs together, where their range is calibrated.
        tokens: how many inputs were seen.
    """

    names: list[str]
    gram: Tensor | None = None
    cross: Tensor | None = None
    low: Tensor | None = None
    high: Tensor | None = None
    values: Histogram | None = None
    tokens: int = 0

    def forget(self) -> None:
        """Let the statistics go."""
        self.gram = self.cross = self.low = self.high = self.values = None
        self.tokens = 0

    def scaled(self, factor: Tensor) -> None:
        """Inputs were divided by `factor`, [in], positive: the statistics follow; the histogram cannot and goes."""
        self.values = None
        if self.gram is not None:
            self.gram = self.gram / factor / factor[:, None]
        if self.cross is not None:
            self.cross = self.cross / factor / factor[:, None]
        if self.low is not None and self.high is not None:
            self.low, self.high = self.low / factor, self.high / factor


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
    y = x * (1.0 / scale)
    return y.round_().add_(zero).clamp_(0.0, top).sub_(zero).mul_(scale)  # one tensor, not five


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


@dataclass
class Streams:
    """What a block is run on.

    Attributes:
        run: a block and a batch to its result.
        batches: hidden states behind the quantized blocks, [windows, length, width] each.
        floats: the same behind the float blocks, or None.
        float_block: the block before anything of it was quantized, or None.
    """

    run: Run
    batches: list[Tensor]
    floats: list[Tensor] | None = None
    float_block: nn.Module | None = None

    def whole(self) -> Tensor:
        """All batches as one tensor, without a copy where they are parts of one."""
        base = self.batches[0]._base
        count = sum(len(b) for b in self.batches)
        return base if base is not None and len(base) == count else torch.cat(self.batches)


class _AllSeen(Exception):
    """Every group of layers has been reached."""


def observe(
    block: nn.Module, streams: Streams, groups: list[Group], schemes: dict[str, Scheme], gram: bool
) -> None:
    """Fill the statistics of groups from what their first layers read: extremes, and second moments if wanted.

    Of inputs whose range is calibrated, a histogram too.

    With a float stream also the moments between its inputs and those of the quantized one. Where the first batch
    reached every group once, the later ones run no further than to the last of them.
    """
    for group in groups:
        group.forget()
    counts, stops = [0] * len(groups), False
    paired = gram and streams.floats is not None and streams.float_block is not None
    beside: dict[int, Tensor] = {}

    def keep(index: int) -> Callable[..., None]:
        def look(module: nn.Module, args: tuple[Tensor]) -> None:
            beside[index] = args[0].reshape(-1, args[0].shape[-1])
            if stops and len(beside) == len(groups):
                raise _AllSeen

        return look

    def count(index: int) -> Callable[..., None]:
        group = groups[index]

        def look(module: nn.Module, args: tuple[Tensor]) -> None:
            x = args[0].reshape(-1, args[0].shape[-1])
            low, high = x.amin(0).clamp(max=0.0), x.amax(0).clamp(min=0.0)
            group.low = low if group.low is None else torch.minimum(group.low, low)
            group.high = high if group.high is None else torch.maximum(group.high, high)
            group.tokens += len(x)
            if schemes[group.names[0]].static:
                group.values = group.values or Histogram()
                group.values.update(x)
            if gram:
                x = round_tokens(x, schemes[group.names[0]])
                group.gram = x.T @ x if group.gram is None else group.gram.addmm_(x.T, x)
            if paired:
                y = beside.pop(index)
                group.cross = y.T @ x if group.cross is None else group.cross.addmm_(y.T, x)
            counts[index] += 1
            if stops and all(counts):
                raise _AllSeen

        return look

    handles = [
        block.get_submodule(g.names[0]).register_forward_pre_hook(count(i), prepend=True)
        for i, g in enumerate(groups)
    ]
    if paired:
        assert streams.float_block is not None
        assert streams.floats is not None
        handles += [
            streams.float_block.get_submodule(g.names[0]).register_forward_pre_hook(keep(i))
            for i, g in enumerate(groups)
        ]
    try:
        with torch.no_grad():
            for i, hidden in enumerate(streams.batches):
                counts[:] = [0] * len(groups)
                if paired:
                    with suppress(_AllSeen):
                        streams.run(streams.float_block, streams.floats[i])  # type: ignore[arg-type, index]
                with suppress(_AllSeen):
                    streams.run(block, hidden)
                stops = stops or (i == 0 and counts == [1] * len(groups))
    finally:
        for handle in handles:
            handle.remove()
    for group in groups:
        if group.gram is not None:
            group.gram.div_(group.tokens)
        if group.cross is not None:
            group.cross.div_(group.tokens)


def input_params(group: Group, scheme: Scheme) -> Tensor | None:
    """Scale and zero point [2] of calibrated activations, None for others: of the range of least squared error.

    Products of gates have tails so long that codes of 8 bits for the extremes leave too few to the rest.
    """
    if not scheme.static or scheme.input is None or group.values is None:
        return None
    ends = MSE()(group.values, scheme.input)
    assert ends.zero is not None
    return torch.stack([ends.scale, ends.zero])


def turned_by(layer: nn.Module) -> int:
    """Size of the blocks by which a layer turns its inputs, 0 for most; see `online`."""
    return int(getattr(layer, "hadamard", 0))


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
        outcome.losses[name] = relative_loss(weight, q, group.gram)
        outcome.layers[name] = Solved(scheme, q, input_params(group, scheme), turned_by(layer))
        layer.weight = nn.Parameter(q.dequantize(), requires_grad=False)

"""Hidden states between blocks: caught once at the first block, then carried from block to block, batch by batch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from pennyweight.atomic import atomic_write
from pennyweight.errors import FormatError, GraphError, NonFinite
from pennyweight.llm.skeleton import Skeleton

TOKENS_AT_ONCE = 2048  # of a batch: what blocks are run on


class _Done(Exception):
    """Every block has been reached."""


@dataclass
class Calls:
    """How blocks are called, apart from the hidden states: by block, and by the number of windows in the batch.

    Attributes:
        wraps: whether blocks return a tuple.
    """

    found: dict[tuple[int, int], tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=dict)
    wraps: bool = False

    def run(self, block: nn.Module, index: int, hidden: Tensor) -> Tensor:
        """A block's result, [windows, length, width]."""
        args, kwargs = self._of(index, len(hidden))
        name = next(iter(kwargs.get("_first", ())), "")
        rest = {k: v for k, v in kwargs.items() if k != "_first"}
        y = block(*args, **{name: hidden}, **rest) if name else block(hidden, *args, **rest)
        return first_tensor(y)

    def _of(self, index: int, windows: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments for a batch of so many windows; those of the full batch cut short, where it was never seen."""
        if (index, windows) in self.found:
            return self.found[index, windows]
        full = max(n for i, n in self.found if i == index)

        def cut(x: Any) -> Any:
            return x[:windows] if isinstance(x, Tensor) and x.ndim and len(x) == full else x

        found: tuple[tuple[Any, ...], dict[str, Any]] = tree_map(cut, self.found[index, full])
        return found


def first_tensor(y: Any) -> Tensor:
    """The hidden states of what a block returned."""
    found = y[0] if isinstance(y, tuple | list) else y
    if not isinstance(found, Tensor):
        raise GraphError(f"a block returned {type(found).__name__}, no hidden states")
    return found


def batch_size(length: int) -> int:
    """Windows of a batch."""
    return max(1, TOKENS_AT_ONCE // length)


def enter(skeleton: Skeleton, ids: Tensor, *, through: bool = False) -> tuple[Tensor, Calls]:
    """Run everything before the first block.

    Args:
        skeleton: of the model; its parts outside of the blocks are filled for the time of the call.
        ids: int64 [windows, length].
        through: run what is behind the blocks too, as if these did nothing.

    Returns:
        The hidden states that enter the first block, float32 [windows, length, width], and how blocks are called.

    Raises:
        NonFinite: if a hidden state is NaN or infinite.
    """
    calls, parts = Calls(), []
    blocks = [skeleton.block(i) for i in range(len(skeleton.blocks))]
    wraps = calls.wraps = _returns_tuple(skeleton, ids)
    entered: list[Tensor] = []

    def catcher(index: int) -> Callable[..., Any]:
        def caught(*args: Any, **kwargs: Any) -> Any:
            if args:
                hidden, args = args[0], args[1:]
                extra: dict[str, Any] = {}
            else:
                name = next(iter(kwargs))
                hidden, extra = kwargs.pop(name), {"_first": (name,)}
            if index == 0:
                entered.append(hidden)
            calls.found.setdefault((index, len(hidden)), (args, kwargs | extra))
            if index == len(blocks) - 1 and not through:
                raise _Done
            return (hidden,) if wraps else hidden

        return caught

    with torch.no_grad(), skeleton.on_demand(), _forwards(blocks, catcher):
        for part in ids.split(batch_size(ids.shape[1])):
            with suppress(_Done):
                skeleton.model(part, **calls_without_cache(skeleton.model))
            parts.append(entered.pop())
    hidden = torch.cat(parts).float()
    if not bool(torch.isfinite(hidden).all()):
        raise NonFinite("the hidden states before the first block hold NaN or infinity")
    return hidden, calls


def carried(skeleton: Skeleton, calls: Calls, ids: Tensor, hidden: Tensor, see: Callable[[Any], Any]) -> Any:
    """Run what is behind the blocks, as if these made `hidden`, and look at the result.

    Args:
        skeleton: of the model; its parts outside of the blocks are filled for the time of the call.
        calls: how blocks are called.
        ids: int64 [windows, length].
        hidden: behind the last block, [windows, length, width].
        see: given the model's result while the weights are there.

    Returns:
        What `see` returns.
    """
    blocks = [skeleton.block(i) for i in range(len(skeleton.blocks))]

    def catcher(index: int) -> Callable[..., Any]:
        def caught(*args: Any, **kwargs: Any) -> Any:
            return (hidden,) if calls.wraps else hidden

        return caught

    with skeleton.on_demand(), _forwards(blocks, catcher):
        return see(skeleton.model(ids, **calls_without_cache(skeleton.model)))


def calls_without_cache(model: nn.Module) -> dict[str, bool]:
    """Keyword arguments that keep a model from keeping keys and values; encoders take none."""
    return {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}


@contextmanager
def _forwards(blocks: list[nn.Module], make: Callable[[int], Callable[..., Any]]) -> Iterator[None]:
    for i, block in enumerate(blocks):
        block.forward = make(i)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def _returns_tuple(skeleton: Skeleton, ids: Tensor) -> bool:
    """Whether blocks wrap their result: the first block runs once on a short window to see."""
    block, answer = skeleton.block(0), []
    original = block.forward

    def look(*args: Any, **kwargs: Any) -> Any:
        answer.append(isinstance(original(*args, **kwargs), tuple | list))
        raise _Done

    skeleton.fill(skeleton.blocks[0])
    block.forward = look
    try:
        with torch.no_grad(), skeleton.on_demand():
            skeleton.model(ids[:1, :4], **calls_without_cache(skeleton.model))
    except _Done:
        return answer[0]
    finally:
        del block.forward
        skeleton.empty(skeleton.blocks[0])
    raise GraphError("the model never called its first block", site=skeleton.blocks[0])


def save_states(path: Path, step: int, states: dict[str, Tensor]) -> None:
    """Keep hidden states, whole or not at all."""
    with atomic_write(path) as file:
        file.write(save({k: v.contiguous() for k, v in states.items()}, {"step": str(step)}))


def load_states(path: Path) -> tuple[int, dict[str, Tensor]]:
    """The inverse of `save_states`.

    Raises:
        FormatError: if the file is broken.
    """
    try:
        with safe_open(str(path), framework="pt") as opened:
            return int(opened.metadata()["step"]), {k: opened.get_tensor(k) for k in opened.keys()}  # noqa: SIM118
    except Exception as error:  # whatever the reader makes of a broken file
        raise FormatError(f"kept hidden states cannot be read: {error}", site=path.name) from error

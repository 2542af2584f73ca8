"""Run a model over the same batches again and again, without computing anew what is finished."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from pennyweight.graph.graph import Graph, Ref
from pennyweight.graph.record import call
from pennyweight.nn.sites import aside
from pennyweight.reconstruction.capture import ReachedError


class Replay:
    """The results of modules that will not change any more stand in for them, batch by batch.

    A run up to a layer then costs no more than what lies between it and the finished modules before it. Results that
    nothing unfinished reads are let go.

    Args:
        model: what runs.
        graph: as it was recorded.
        batches: gives the same batches whenever it is called.
        order: names of the layers that change, as they will be settled.
    """

    def __init__(
        self, model: nn.Module, graph: Graph, batches: Callable[[], Iterable[Any]], order: Iterable[str] = ()
    ) -> None:
        self.model, self.graph, self._order = model, graph, list(order)
        self._batches, self._at = batches, 0
        self._kept: dict[str, list[Any]] = {}

    def batches(self) -> Iterator[Any]:
        """The batches; results are those of the one that was given last."""
        for self._at, batch in enumerate(self._batches()):  # noqa: B020 (an attribute)
            yield batch

    @contextmanager
    def running(self) -> Iterator[None]:
        """Within, finished modules answer from memory."""
        modules = [self.model.get_submodule(path) for path in self._kept]
        try:
            for path, module in zip(self._kept, modules, strict=True):
                module.forward = self._answer(path)
            yield
        finally:
            for module in modules:
                del module.__dict__["forward"]

    def _answer(self, path: str) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            with aside():
                return tree_map(_fresh, self._kept[path][self._at])

        return forward

    def settle(self, path: str) -> None:
        """`finish` the largest module around a layer, or the layer itself, in which no later layer of `order` lies.

        What lies between finished layers, as attention and activations do, is not computed again then.
        """
        later = self._order[len(self._order) - self._order[::-1].index(path) :]
        open_paths = [name.partition(":")[0] for name in later]
        parent = path.rpartition(".")[0]
        while parent and not any(_within(p, parent) for p in open_paths) and parent in self._once:
            path, parent = parent, parent.rpartition(".")[0]
        self.finish(path)

    @cached_property
    def _once(self) -> frozenset[str]:
        """Paths of the modules that one batch calls once."""
        calls: Counter[str] = Counter()
        handles = [
            module.register_forward_pre_hook(lambda m, args, path=path: calls.update((path,)))
            for path, module in self.model.named_modules(remove_duplicate=False)
        ]
        try:
            with torch.no_grad(), self.running():
                for batch in islice(self.batches(), 1):
                    call(self.model, batch)
        finally:
            for handle in handles:
                handle.remove()
        return frozenset(path for path, count in calls.items() if count == 1)

    def finish(self, path: str) -> list[Any]:
        """Run up to a module that is called once a batch, and keep its results; returns them, batch by batch."""
        found: list[Any] = []

        def after(_: nn.Module, args: Any, result: Any) -> None:
            found.append(tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, result))
            raise ReachedError

        handle = self.model.get_submodule(path).register_forward_hook(after)
        try:
            with torch.no_grad(), self.running():
                for batch in self.batches():
                    try:
                        call(self.model, batch)
                    except ReachedError:
                        continue
        finally:
            handle.remove()
        self._kept = {p: kept for p, kept in self._kept.items() if not _within(p, path)}
        self._kept[path] = found
        for other in list(self._kept):
            if not self._read(other):
                self._kept[other] = [tree_map(_shape, result) for result in self._kept[other]]
        return found

    def _read(self, path: str) -> bool:
        """Whether something unfinished reads the results of a finished module, past whatever is computed in between."""
        own = [n for n in self.graph if n.kind != "input" and _within(n.path, path)]
        ids = {n.id for n in own}
        pending = [Ref(n.id, i) for n in own for i in range(len(n.outputs))]
        seen: set[Ref] = set()
        while pending:
            ref = pending.pop()
            for node, _ in self.graph.users(ref):
                if node.id in ids or any(_within(node.path, p) for p in self._kept if node.kind != "output"):
                    continue
                if node.kind != "call":
                    return True
                new = [Ref(node.id, i) for i in range(len(node.outputs))]
                pending += [r for r in new if r not in seen]
                seen.update(new)
        return False


def _within(path: str, around: str) -> bool:
    return path == around or path.startswith(f"{around}.")


def _shape(x: Any) -> Any:
    return _Gone(tuple(x.shape), x.dtype) if isinstance(x, Tensor) else x


class _Gone:
    """A tensor that nobody will read."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.shape, self.dtype = shape, dtype


def _fresh(x: Any) -> Any:
    """What is kept, safe from operations in place; zeros where nothing is."""
    if isinstance(x, _Gone):
        return torch.zeros(x.shape, dtype=x.dtype)
    return x.clone() if isinstance(x, Tensor) else x

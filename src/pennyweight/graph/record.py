"""Record the dataflow of one eager run: a function mode and module hooks, both active for that run alone.

Sees any Python control flow (the executed branch), in-place chains, `.item()`, tied weights, dicts in and out. It
loses an edge only where data leave torch, through NumPy for instance.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_flatten

from pennyweight.errors import GraphError
from pennyweight.graph.graph import Graph, Node, Ref, Value

Batch = Any  # a tensor, a tuple of positional arguments, or a dict of keyword arguments

_REFLECTED = {
    "__radd__": "add",
    "__rmul__": "mul",
    "__rsub__": "rsub",
    "__rtruediv__": "rdiv",
    "__rmatmul__": "rmatmul",
}
_SYNONYMS = {
    "truediv": "div",
    "divide": "div",
    "multiply": "mul",
    "subtract": "sub",
    "concat": "cat",
    "concatenate": "cat",
    "get": "get",
}


def op_name(func: Callable[..., Any]) -> str:
    """One name for all spellings of an operation: `+`, `add_`, `torch.add` are "add".

    >>> op_name(torch.Tensor.__iadd__), op_name(torch.nn.functional.relu), op_name(torch.Tensor.add_)
    ('add', 'relu', 'add')
    """
    name = getattr(func, "__name__", "")
    if name in _REFLECTED:
        return _REFLECTED[name]
    if name == "__get__":
        return (resolve_name(func) or "get").split(".")[-2].lower()
    name = name.partition(".")[0]  # torch.ops.aten.add.Tensor calls itself "add.Tensor"
    name = name.strip("_") if name.startswith("__") else name.rstrip("_")
    if re.fullmatch(r"i(add|sub|mul|truediv|matmul)", name):
        name = name[1:]
    return _SYNONYMS.get(name, name)


def call(model: nn.Module, batch: Batch) -> Any:
    """Run the model on one batch: a tensor, a tuple or list of positional arguments, or a dict of keyword arguments.

    Raises:
        GraphError: if the batch does not fit the model's signature, with the way to say how it does.
    """
    try:
        if isinstance(batch, Mapping):
            return model(**batch)
        if isinstance(batch, tuple | list):
            return model(*batch)
        return model(batch)
    except TypeError as error:
        if "positional argument" in str(error) or "keyword argument" in str(error):
            raise GraphError(
                f"the model does not take such a batch: {error}",
                site=type(model).__name__,
                hint="Pass an iterable of model inputs, e.g. (images for images, labels in loader); a tuple is taken "
                "as positional arguments, a dict as keyword arguments.",
            ) from error
        raise


class _Recorder(TorchFunctionMode):
    """Appends a node for every torch call outside of leaf modules, and for every leaf module."""

    def __init__(self, names: dict[int, str], leaves: frozenset[str]) -> None:
        super().__init__()
        self.nodes: list[Node] = []
        self.names, self.leaves = names, leaves
        self.values: dict[int, Ref] = {}
        self.alive: list[Tensor] = []  # keeps ids unique for the length of the run
        self.stack: list[tuple[str, dict[str, int]]] = [("", {})]
        self.calls: dict[str, int] = {}
        self.inside_leaf = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self.inside_leaf:
            name = op_name(func)
            produced = args[0] if name == "setitem" else result
            path, counts = self.stack[-1]
            if any(isinstance(x, Tensor) for x in tree_flatten(produced)[0]):
                index = counts.get(name, 0)
                counts[name] = index + 1
                self.add("call", path, name, index, args, kwargs or {}, produced)
        return result

    def add(
        self, kind: str, path: str, op: str, index: int, args: Any, kwargs: dict[str, Any], result: Any
    ) -> None:
        """Append a node."""
        operands = [x for a in (*args, *kwargs.values()) for x in tree_flatten(a)[0]]
        inputs: list[Ref | None] = []
        params: dict[int, str] = {}
        scalars: dict[int, float] = {}
        for position, x in enumerate(operands):
            ref = None
            if isinstance(x, Tensor):
                ref = self.values.get(id(x))
                if ref is None and id(x) in self.names:
                    params[position] = self.names[id(x)]
            elif isinstance(x, bool | int | float):
                scalars[position] = float(x)
            inputs.append(ref)
        outputs = [x for x in tree_flatten(result)[0] if isinstance(x, Tensor)]
        values = tuple(Value(tuple(x.shape), str(x.dtype).removeprefix("torch.")) for x in outputs)
        node = Node(len(self.nodes), kind, path, op, index, tuple(inputs), params, values, scalars)
        self.nodes.append(node)
        for i, x in enumerate(outputs):
            self.values[id(x)] = Ref(node.id, i)
            self.alive.append(x)

    def enter(self, path: str) -> None:
        """A module that is not a leaf begins its forward."""
        self.stack.append((path, {}))

    def leave(self) -> None:
        """It ended."""
        self.stack.pop()


def _hook(recorder: _Recorder, module: nn.Module, path: str, handles: ExitStack) -> None:
    leaf = type(module).__name__ in recorder.leaves

    def before(_: nn.Module, args: Any, kwargs: Any) -> None:
        if leaf:
            recorder.inside_leaf += 1
        else:
            recorder.enter(path)

    def after(_: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        if not leaf:
            recorder.leave()
            return
        recorder.inside_leaf -= 1
        if not recorder.inside_leaf:
            index = recorder.calls.get(path, 0)
            recorder.calls[path] = index + 1
            recorder.add("module", path, type(module).__name__, index, args, kwargs, result)

    first = module.register_forward_pre_hook(before, with_kwargs=True)
    second = module.register_forward_hook(after, with_kwargs=True)
    handles.callback(first.remove)
    handles.callback(second.remove)


def leaves_only(model: nn.Module, leaves: Iterable[str]) -> Graph:
    """The leaf modules as nodes without edges: what can be known of a model that was never run.

    Args:
        model: any module.
        leaves: as for `record`.
    """
    chosen = frozenset(leaves)
    types = {path: type(m).__name__ for path, m in model.named_modules()}
    nodes: list[Node] = []
    inside: tuple[str, ...] = ()
    for path, kind in types.items():
        if kind in chosen and not (inside and path.startswith(inside)):
            nodes.append(Node(len(nodes), "module", path, kind, 0, (None,), {}, ()))
            inside = (*inside, f"{path}.")
    return Graph(tuple(nodes), types)


def record(model: nn.Module, batches: Iterable[Batch], leaves: Iterable[str] = ()) -> Graph:
    """Run `model` once per batch, under `no_grad` and in its present mode, and return what was called.

    Args:
        model: any module; hooks are added for the run and removed after it.
        batches: example inputs; several of them record several branches.
        leaves: class names of modules that are one node each, whatever they do inside.

    Raises:
        GraphError: if there is no batch, or the batch does not fit the model.
    """
    names = {id(t): n for n, t in [*model.named_parameters(), *model.named_buffers()]}
    types = {path: type(m).__name__ for path, m in model.named_modules()}
    nodes: list[Node] = []
    seen = False
    for batch in batches:
        seen = True
        recorder = _Recorder(names, frozenset(leaves))
        recorder.nodes = nodes
        with ExitStack() as handles, torch.no_grad():
            handles.callback(
                torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled()
            )
            torch.backends.mha.set_fastpath_enabled(False)  # fused kernels hide what is inside of them
            for path, module in model.named_modules():
                _hook(recorder, module, path, handles)
            recorder.add("input", "", "input", 0, (), {}, batch)
            with recorder:
                result = call(model, batch)
            recorder.add("output", "", "output", 0, (result,), {}, ())
    if not seen:
        raise GraphError("no example batch to record from", hint="Give at least one batch of inputs.")
    return Graph(tuple(nodes), types)

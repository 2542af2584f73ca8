"""From a graph of functions back to modules: nodes of layers, norms and dropout become module calls.

What `torch.export` gives has parameters and functions but no layers; with its layers back it takes the same road as
any other model. Parameters are shared, not copied.
"""

from __future__ import annotations

import operator
from collections.abc import Collection
from importlib import import_module
from types import MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_flatten

from pennyweight.graph.layers import Found, function_name, layer_of
from pennyweight.graph.record import op_name


def modularize(graph_module: fx.GraphModule, *, keep_modes: bool = False) -> Layered:
    """A plain module with the graph's layers; the graph module given is used up.

    Batch norms with running statistics and dropout of every kind become live modules, with the eps, momentum and
    probability that the graph holds, whichever mode it was made in: `train()` and `eval()` then mean what they always
    do. Nodes whose weight is computed, or that have no running statistics, stay functions. The exporter's checks of
    its example's sizes are dropped.

    Args:
        graph_module: of `torch.export.load(path).module()`, or of `torch.fx.symbolic_trace`.
        keep_modes: leave each norm and dropout in the mode that the graph has it in; all are in eval mode otherwise.
    """
    made: dict[tuple[Any, ...], str] = {}
    graph = graph_module.graph
    names: dict[str, str] = {}
    norms: set[str] = set()
    for node in list(graph.nodes):
        found = layer_of(graph_module, node) if node.op == "call_function" else None
        if found is None:
            continue
        if found.key not in made:
            made[found.key] = _place(graph_module, found, made.values())
        if isinstance(found.module, _BatchNorm):
            norms.add(found.path)
        with graph.inserting_before(node):
            new = graph.call_module(made[found.key], found.args, found.kwargs)
        new.meta = dict(node.meta)
        names[node.name] = made[found.key] + found.inner
        if found.nested:
            _nest(node, new)
        node.replace_all_uses_with(new)
        graph.erase_node(node)
    _drop_counters(graph, norms)
    for node in reversed(list(graph.nodes)):
        if (node.op == "get_attr" or node.target == "_guards_fn") and not node.users:
            graph.erase_node(node)
    layered = Layered(graph_module, names | _call_names(graph))
    return layered if keep_modes else layered.eval()


def _nest(node: fx.Node, new: fx.Node) -> None:
    """Readers of `node[1]`, `node[2]` read `new[1][0]`, `new[1][1]`."""
    for user in list(node.users):
        index = user.args[1]
        if user.target is operator.getitem and isinstance(index, int) and index > 0:
            with node.graph.inserting_before(user):
                rest = node.graph.call_function(operator.getitem, (new, 1))
            user.args = (rest, index - 1)


def _drop_counters(graph: fx.Graph, norms: set[str]) -> None:
    """Norms count their batches themselves: the graph's own `num_batches_tracked += 1` would count them twice."""
    for node in list(graph.nodes):
        if node.op != "call_function" or function_name(node.target) != "add_" or node.users:
            continue
        path, _, last = str(getattr(node.args[0], "target", "")).rpartition(".")
        if last == "num_batches_tracked" and path in norms:
            graph.erase_node(node)


def _call_names(graph: fx.Graph) -> dict[str, str]:
    """What the recorder calls each function call of the graph, `:op/index`, by node name. It counts tensors only."""
    counts: dict[str, int] = {}
    names: dict[str, str] = {}
    for node in graph.nodes:
        value = node.meta.get("val", torch.empty(0))
        tensors = any(isinstance(x, Tensor) for x in tree_flatten(value)[0])
        if node.op != "call_function" or node.target is operator.getitem or not tensors:
            continue
        name = op_name(node.target)
        index = counts.get(name, 0)
        counts[name] = index + 1
        names[node.name] = f":{name}/{index}"
    return names


class Layered(nn.Module):
    """A graph's modules, called as the graph says, in a plain module.

    Unlike an `fx.GraphModule` it is called like any other: hooks run everywhere, under `torch.export` too, which is
    where function calls are quantized. Copies and pickles make `forward` anew from its code.

    Attributes:
        code: what `forward` does, to be read.
        names: what the recorder calls each layer and function call, by the name of its node in the graph.
    """

    def __init__(self, graph_module: fx.GraphModule, names: dict[str, str]) -> None:
        super().__init__()
        plain = fx.GraphModule(graph_module, graph_module.graph)
        for table in ("_parameters", "_buffers", "_modules"):
            getattr(self, table).update(getattr(plain, table))
        for name in ("_in_spec", "_out_spec"):  # how the generated code takes its arguments apart
            if name in vars(plain):
                vars(self)[name] = vars(plain)[name]
        made = plain.graph.python_code(root_module="self")
        self.code: str = made.src
        self.names = names
        self._globals: dict[str, Any] = {
            n: _Module(x.__name__) if isinstance(x, ModuleType) else x for n, x in made.globals.items()
        }
        self._compile()

    def _compile(self) -> None:
        """Bind a `forward` that does what the code says."""
        space: dict[str, Any] = {
            n: import_module(x) if isinstance(x, _Module) else x for n, x in self._globals.items()
        }
        exec(compile(self.code, f"<graph of {len(self.names)} calls>", "exec"), space)
        vars(self)["forward"] = MethodType(space["forward"], self)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if k != "forward"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._compile()


class _Module(str):
    """The name of a module that generated code refers to: modules themselves are not pickled."""

    __slots__ = ()


def _place(owner: fx.GraphModule, found: Found, taken: Collection[str]) -> str:
    """Put a layer where its tensors were, or beside what else stands there; returns the path.

    taken: paths of layers, which have no room inside: the twins they become keep no children.
    """
    parent_path, _, name = found.path.rpartition(".")
    while parent_path in taken:
        parent_path, _, above = parent_path.rpartition(".")
        name = f"{above}_{name}"
    held = _submodule(owner, f"{parent_path}.{name}".lstrip("."))
    if held is not None and type(held) is nn.Module and _holds_more(held, found.module):
        parent_path, name = f"{parent_path}.{name}".lstrip("."), found.stem
        held = held._modules.get(name)
    if parent_path and _submodule(owner, parent_path) is None:
        owner.add_submodule(parent_path, nn.Module())
    parent = owner.get_submodule(parent_path)
    if held is not None and (held._modules or type(held) is not nn.Module):
        name = f"{name}_{len(parent._modules)}"
    elif held is None and hasattr(parent, name):
        name += "_layer"  # a tensor has the name
    parent.add_module(name, found.module)
    return f"{parent_path}.{name}".lstrip(".")


def _holds_more(held: nn.Module, layer: nn.Module) -> bool:
    """Whether a place has other layers or tensors too, as that of an attention has its projections."""
    own = {id(t) for t in [*layer.parameters(), *layer.buffers()]}
    return bool(held._modules) or any(id(t) not in own for t in [*held.parameters(), *held.buffers()])


def _submodule(owner: nn.Module, path: str) -> nn.Module | None:
    try:
        return owner.get_submodule(path)
    except AttributeError:
        return None

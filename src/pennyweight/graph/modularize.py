"""From a graph of functions back to modules: convolution, linear and batch norm nodes become module calls.

What `torch.export` gives has parameters and functions but no layers; with its layers back it takes the same road as
any other model. Parameters are shared, not copied.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

_CONVS: dict[str, type[nn.Module]] = {"conv1d": nn.Conv1d, "conv2d": nn.Conv2d, "conv3d": nn.Conv3d}
_TRANSPOSED: dict[str, type[nn.Module]] = {
    "conv_transpose1d": nn.ConvTranspose1d,
    "conv_transpose2d": nn.ConvTranspose2d,
    "conv_transpose3d": nn.ConvTranspose3d,
}
_NORMS: dict[int, type[nn.Module]] = {
    2: nn.BatchNorm1d,
    3: nn.BatchNorm1d,
    4: nn.BatchNorm2d,
    5: nn.BatchNorm3d,
}
_SIGNATURES: dict[str, tuple[tuple[str, Any], ...]] = {
    "linear": (),
    "conv": (("stride", 1), ("padding", 0), ("dilation", 1), ("groups", 1)),
    "transposed": (("stride", 1), ("padding", 0), ("output_padding", 0), ("groups", 1), ("dilation", 1)),
    "norm": (
        ("running_mean", None), ("running_var", None), ("training", False), ("momentum", 0.1), ("eps", 1e-5),
    ),
}  # fmt: skip


def modularize(graph_module: fx.GraphModule) -> Layered:
    """A plain module with the graph's layers; the graph module given is used up.

    Nodes whose weight is computed, or that normalise by the batch's own statistics, stay functions. The exporter's
    checks of its example's sizes are dropped.

    Args:
        graph_module: of `torch.export.load(path).module()`, or of `torch.fx.symbolic_trace`.
    """
    made: dict[tuple[Any, ...], str] = {}
    graph = graph_module.graph
    for node in list(graph.nodes):
        found = _layer(graph_module, node) if node.op == "call_function" else None
        if found is None:
            continue
        layer, path, key = found
        if key not in made:
            made[key] = _place(graph_module, path, layer)
        with graph.inserting_before(node):
            new = graph.call_module(made[key], (node.args[0],))
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        graph.erase_node(node)
    for node in reversed(list(graph.nodes)):
        if (node.op == "get_attr" or node.target == "_guards_fn") and not node.users:
            graph.erase_node(node)
    return Layered(graph_module).eval()


class Layered(nn.Module):
    """A graph's modules, called as the graph says, in a plain module.

    Unlike an `fx.GraphModule` it is called like any other: hooks run everywhere, under `torch.export` too, which is
    where function calls are quantized. It can be copied but not pickled: its code was made, not written.

    Attributes:
        code: what `forward` does, to be read.
    """

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__()
        plain = fx.GraphModule(graph_module, graph_module.graph)
        for table in ("_parameters", "_buffers", "_modules"):
            getattr(self, table).update(getattr(plain, table))
        for name in ("_in_spec", "_out_spec"):  # how the generated code takes its arguments apart
            if name in vars(plain):
                vars(self)[name] = vars(plain)[name]
        self.code: str = plain.code
        self.forward = MethodType(type(plain).forward, self)  # copied with the module, as bound methods are


def _name(target: Any) -> str:
    """`torch.ops.aten.conv2d.default` and `F.conv2d` are both "conv2d"."""
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.rpartition("::")[2]
    if target in (F.linear, F.batch_norm) or getattr(target, "__module__", "") in ("torch._C._nn", "torch"):
        return str(getattr(target, "__name__", ""))
    return (
        str(getattr(target, "__name__", ""))
        if getattr(F, getattr(target, "__name__", "?"), None) is target
        else ""
    )


def _layer(owner: fx.GraphModule, node: fx.Node) -> tuple[nn.Module, str, tuple[Any, ...]] | None:
    """The module that does what a node does, where to put it, and what tells it from others."""
    name = _name(node.target)
    family = (
        "linear"
        if name == "linear"
        else "conv"
        if name in _CONVS
        else "transposed"
        if name in _TRANSPOSED
        else ""
    )
    if name == "batch_norm":
        return _norm(owner, node)
    if not family:
        return None
    names = ("weight", "bias", *(n for n, _ in _SIGNATURES[family]))
    given = _bound(node, names, dict(_SIGNATURES[family]))
    weight, bias = _stored(owner, given["weight"]), _stored(owner, given["bias"])
    if weight is None or (bias is None and given["bias"] is not None):
        return None
    options = {n: _plain(given[n]) for n, _ in _SIGNATURES[family]}
    if any(isinstance(v, fx.Node) for v in options.values()):
        return None
    shape = weight.shape
    if family == "linear":
        module: nn.Module = nn.Linear(shape[1], shape[0], bias is not None, device="meta")
    else:
        groups, kernel = options["groups"], tuple(shape[2:])
        channels = (shape[1] * groups, shape[0]) if family == "conv" else (shape[0], shape[1] * groups)
        kind = (_CONVS if family == "conv" else _TRANSPOSED)[name]
        module = kind(*channels, kernel, bias=bias is not None, device="meta", **options)
    module.weight = weight
    if bias is not None:
        module.bias = bias
    target = str(given["weight"].target)
    return module.train(owner.training), target, (name, target, str(options))


def _norm(owner: fx.GraphModule, node: fx.Node) -> tuple[nn.Module, str, tuple[Any, ...]] | None:
    aten = isinstance(node.target, torch._ops.OpOverload)
    lead = ("weight", "bias", "running_mean", "running_var") if aten else (
        "running_mean", "running_var", "weight", "bias",
    )  # fmt: skip
    given = _bound(node, (*lead, "training", "momentum", "eps"), dict(_SIGNATURES["norm"]))
    tensors = {k: _stored(owner, given[k]) for k in lead}
    value = node.args[0].meta.get("val") if isinstance(node.args[0], fx.Node) else None
    kind = _NORMS.get(value.ndim) if isinstance(value, Tensor) else nn.BatchNorm2d
    mean, var = tensors["running_mean"], tensors["running_var"]
    if mean is None or var is None or given["training"] or kind is None:
        return None
    affine = tensors["weight"] is not None
    momentum, eps = given["momentum"], given["eps"]
    module: Any = kind(mean.shape[0], eps=eps, momentum=momentum, affine=affine, device="meta")
    module.running_mean, module.running_var = mean, var
    module.num_batches_tracked = torch.zeros((), dtype=torch.int64)
    if affine:
        module.weight = tensors["weight"]
        bias = tensors["bias"]
        module.bias = nn.Parameter(torch.zeros_like(mean)) if bias is None else bias
    target = str(given["running_mean"].target)
    return module.eval(), target, ("batch_norm", target, eps)


def _bound(node: fx.Node, names: tuple[str, ...], defaults: dict[str, Any]) -> dict[str, Any]:
    """Operands behind the first one by name."""
    given = dict(zip(names, node.args[1:], strict=False))
    return {n: given.get(n, node.kwargs.get(n, defaults.get(n))) for n in names}


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list | tuple) else value


def _stored(owner: nn.Module, node: Any) -> Any:
    """The parameter or buffer that a node fetches."""
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    value: Any = owner
    for part in str(node.target).split("."):
        value = getattr(value, part, None)
    return value if isinstance(value, Tensor) else None


def _place(owner: nn.Module, target: str, layer: nn.Module) -> str:
    """Put a layer where its first tensor was, under the path of the module that held it; returns the path."""
    path = target.rpartition(".")[0] or target.replace(".", "_") + "_layer"
    parent_path, _, name = path.rpartition(".")
    parent = owner.get_submodule(parent_path)
    held = parent._modules.get(name)
    if held is not None and (held._modules or type(held) is not nn.Module):
        name = f"{name}_{len(parent._modules)}"  # the place holds more than this layer's tensors
    parent.add_module(name, layer)
    return f"{parent_path}.{name}".lstrip(".")

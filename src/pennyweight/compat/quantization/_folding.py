"""Batch norms of an exported graph folded into the layers before them, so that quantizers see neither."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from pennyweight.graph import ops
from pennyweight.graph.layers import function_name, layer_of
from pennyweight.nn.conv import backward_weight, forward_weight
from pennyweight.passes.fold_batch_norm import folded


def fold_norms(graph_module: fx.GraphModule) -> list[str]:
    """Fold every `batch_norm(layer(x))` in eval mode with no other reader in between; returns the norms' names.

    The layers get parameters of their own: those that the graph shared with a float model stay as they are.
    """
    done = []
    for node in list(graph_module.graph.nodes):
        if node.op != "call_function" or function_name(node.target) != "batch_norm":
            continue
        norm, layer = layer_of(graph_module, node), node.args[0]
        if norm is None or norm.module.training or not isinstance(layer, fx.Node) or len(layer.users) > 1:
            continue
        if _fold(graph_module, layer, norm.module):
            node.replace_all_uses_with(layer)
            graph_module.graph.erase_node(node)
            done.append(norm.path)
    graph_module.recompile()
    return done


def _fold(graph_module: fx.GraphModule, node: fx.Node, norm: Any) -> bool:
    """Give a layer's node the folded weight and bias, as new parameters beside the old ones' names."""
    name = function_name(node.target) if node.op == "call_function" else ""
    found = layer_of(graph_module, node) if name in ops.FUNCTIONAL_LAYERS else None
    if found is None:
        return False
    layer: Any = found.module
    transposed, groups = getattr(layer, "transposed", False), getattr(layer, "groups", 1)
    weight, bias = folded(forward_weight(layer.weight, transposed, groups), layer.bias, norm)
    trains = layer.weight.requires_grad
    new = {
        "weight": nn.Parameter(
            backward_weight(weight, transposed, groups).contiguous(), requires_grad=trains
        ),
        "bias": nn.Parameter(bias, requires_grad=trains),
    }
    path = str(node.args[1].target).rpartition(".")[0]  # type: ignore[union-attr]
    owner = graph_module.get_submodule(path)
    args: list[Any] = [*node.args, *[None] * (3 - len(node.args))]
    for position, (key, value) in enumerate(new.items(), 1):
        readers = args[position].users if isinstance(args[position], fx.Node) else {}
        shared = len(readers) > 1 or (key in owner._parameters and not readers)
        name = f"{key}_of_{node.name}" if shared else key  # another call keeps the old one
        owner.register_parameter(name, value)
        with graph_module.graph.inserting_before(node):
            args[position] = graph_module.graph.get_attr(f"{path}.{name}".lstrip("."))
        args[position].meta["val"] = value
    node.args = tuple(args)
    return True

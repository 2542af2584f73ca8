"""Train and eval mode of exported graphs, in place, with every hyper-parameter kept.

`prepare_pt2e` and `prepare_qat_pt2e` return modules whose norms and dropouts are live: there `train()` and `eval()` do
the same as these functions.
"""

from __future__ import annotations

from types import MethodType
from typing import Any, TypeVar

import torch
from torch import fx, nn

M = TypeVar("M", bound=nn.Module)
_MODE_AT = {  # position of the mode among the operands
    "batch_norm": 5, "dropout": 2, "feature_dropout": 2, "alpha_dropout": 2, "feature_alpha_dropout": 2,
    "rrelu": 3, "lstm": 6, "gru": 6, "rnn_tanh": 6, "rnn_relu": 6,
}  # fmt: skip
_DEFAULTS = {"rrelu": (1 / 8, 1 / 3, False)}  # operands behind the first that the exporter leaves out
_DROPPED = "pennyweight.dropout_p"  # in an attention's meta: its probability in train mode


def move_exported_model_to_eval(model: M) -> M:
    """Norms use their running statistics, dropout is off; eps, momentum and probabilities stay. Returns the model.

    For an exported graph, in place; for any other module it is `model.eval()`.
    """
    return _move(model, False)


def move_exported_model_to_train(model: M) -> M:
    """Norms use and follow the statistics of the batch, dropout is on. Returns the model.

    For an exported graph, in place; for any other module it is `model.train()`.
    """
    return _move(model, True)


def allow_exported_model_train_eval(model: M) -> M:
    """Make `model.train()` and `model.eval()` do the above. Returns the model."""
    if isinstance(model, fx.GraphModule):
        vars(model)["train"] = MethodType(_train, model)
        vars(model)["eval"] = MethodType(_eval, model)
    return model


def model_is_exported(m: nn.Module) -> bool:
    """Whether a module is a graph of `torch.export`."""
    return isinstance(m, fx.GraphModule) and any("val" in n.meta for n in m.graph.nodes)


def _train(self: nn.Module, mode: bool = True) -> nn.Module:
    return _move(self, mode)


def _eval(self: nn.Module) -> nn.Module:
    return _move(self, False)


def _move(model: M, training: bool) -> M:
    if not isinstance(model, fx.GraphModule):
        return model.train(training)
    for node in list(model.graph.nodes):
        name = _aten(node)
        if name == "scaled_dot_product_attention":
            _attend(node, training)
        if name == "batch_norm" and node.args[3] is not None:
            _count(model, node, training)
        elif name not in _MODE_AT or name == "batch_norm":
            continue
        args = [*node.args, *_DEFAULTS.get(name, ())[len(node.args) - 1 :]]
        args[_MODE_AT[name]] = training
        node.args = tuple(args)
    model.recompile()
    model.training = training
    return model


def _attend(node: fx.Node, training: bool) -> None:
    """An attention in eval mode drops nothing, and remembers what it dropped."""
    args = list(node.args)
    if not training and len(args) > 4 and args[4]:
        node.meta[_DROPPED] = args[4]
        args[4] = 0.0
    elif training and _DROPPED in node.meta:
        args[4] = node.meta[_DROPPED]
    node.args = tuple(args)


def _aten(node: Any) -> str:
    target = node.target
    return (
        target._schema.name.removeprefix("aten::").rstrip("_")
        if isinstance(target, torch._ops.OpOverload)
        else ""
    )


def _count(model: fx.GraphModule, norm: fx.Node, training: bool) -> None:
    """A norm in train mode counts its batches, by `num_batches_tracked += 1` in front of it."""
    graph, path = model.graph, str(norm.args[3].target).rpartition(".")[0]  # type: ignore[union-attr]
    buffer = f"{path}.num_batches_tracked"
    counters = [
        n
        for n in graph.nodes
        if _aten(n) == "add" and isinstance(n.args[0], fx.Node) and n.args[0].target == buffer
    ]
    if not training:
        for counter in counters:
            if not counter.users:
                graph.erase_node(counter)
    elif not counters:
        owner = model.get_submodule(path)
        if (
            "num_batches_tracked" not in owner._buffers
        ):  # the strict exporter drops what eval mode does not read
            owner.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.int64))
        with graph.inserting_before(norm):
            source = graph.get_attr(buffer)
            graph.call_function(torch.ops.aten.add_.Tensor, (source, 1))

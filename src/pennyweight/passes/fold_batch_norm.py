"""Fold batch normalisation into the convolution or linear layer before it."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pennyweight.graph import ops
from pennyweight.nn.conv import backward_weight, forward_weight
from pennyweight.passes import Context, Normal, Stage, passes, replace_module


def folded(weight: Tensor, bias: Tensor | None, norm: Any) -> tuple[Tensor, Tensor]:
    """`W' = W * g / sqrt(v + eps)`, `b' = beta + (b - mean) * g / sqrt(v + eps)`, in float64.

    Shapes: weight [out, ...], bias [out] or None; both results float32.
    Source: Jacob et al. 2018 (arXiv:1712.05877), section 3.2.
    """
    factor, shift = factor_and_shift(norm, bias)
    new_weight = weight.detach().double() * factor.reshape(-1, *[1] * (weight.ndim - 1))
    return new_weight.to(weight.dtype), shift.to(weight.dtype)


def factor_and_shift(norm: Any, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """`f = g / sqrt(v + eps)` and `b' = beta + (b - mean) f`, float64 [out]: what a norm does to a layer's outputs."""
    mean, var = norm.running_mean.double(), norm.running_var.double()
    gain = torch.ones_like(mean) if norm.weight is None else norm.weight.detach().double()
    shift = torch.zeros_like(mean) if norm.bias is None else norm.bias.detach().double()
    factor = gain / torch.sqrt(var + norm.eps)
    old = torch.zeros_like(mean) if bias is None else bias.detach().double()
    return factor, shift + (old - mean) * factor


def distribution(norm: Any) -> Normal:
    """`N(beta, gamma^2 v / (v + eps))`: what a norm in eval mode puts out where its running statistics hold."""
    var = norm.running_var.detach().double()
    gain = torch.ones_like(var) if norm.weight is None else norm.weight.detach().double()
    mean = torch.zeros_like(var) if norm.bias is None else norm.bias.detach().double()
    return Normal(mean, gain.abs() * torch.sqrt(var / (var + norm.eps)))


def fold_pair(layer: Any, norm: Any) -> Any:
    """A layer that does what a convolution or linear layer and the norm behind it do; both are left as they are."""
    transposed, groups = getattr(layer, "transposed", False), getattr(layer, "groups", 1)
    weight, bias = folded(forward_weight(layer.weight, transposed, groups), layer.bias, norm)
    new = copy.copy(layer)
    new._parameters = dict(layer._parameters)
    trains = layer.weight.requires_grad
    new.weight = nn.Parameter(backward_weight(weight, transposed, groups).contiguous(), requires_grad=trains)
    new.bias = nn.Parameter(bias, requires_grad=trains)
    return new


@passes.register("fold_batch_norm")
@dataclass(frozen=True)
class FoldBatchNorm:
    """Wherever the graph shows `norm(conv(x))` with no other reader in between, one convolution remains.

    Only norms with running statistics, in eval mode, called once; the user's model is left as it is.
    """

    stage: ClassVar[Stage] = "float"
    preserves_output: ClassVar[bool] = True

    def needs(self) -> set[str]:
        """Nothing."""
        return set()

    def run(self, context: Context) -> None:
        """Fold every pair found; one `fold` event each."""
        graph, root = context.graph, context.model
        for node in graph:
            if node.kind != "module" or node.op not in ops.NORMS or len(graph.modules(node.path)) > 1:
                continue
            ref = node.inputs[0]
            producer = graph.producer(ref) if ref is not None else None
            if ref is None or producer is None or producer.op not in ops.CONVS | {"Linear"}:
                continue
            if len(graph.users(ref)) > 1 or len(graph.modules(producer.path)) > 1:
                context.journal.add("not folded", node.path, reason="the layer before it has other readers")
                continue
            norm: Any = root.get_submodule(node.path)
            layer: Any = root.get_submodule(producer.path)
            if norm.training or norm.running_mean is None:
                context.journal.add(
                    "not folded", node.path, reason="it normalises by the statistics of the batch"
                )
                continue
            new = fold_pair(layer, norm)
            replace_module(root, layer, new)
            replace_module(root, norm, nn.Identity())
            context.outputs[producer.path] = distribution(norm)
            context.journal.add("fold", producer.path, norm=node.path)

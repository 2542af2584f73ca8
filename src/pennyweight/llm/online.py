"""Inputs turned while the model runs: of layers that no rotation of the hidden states reaches.

    y = W x = (W H) (H x)

H is block-diagonal, its blocks orthonormal Hadamard matrices of the largest power of two that divides the inputs: it is
symmetric and its own inverse. `W H` is what is quantized; `H x`, in which an outlier of one channel is spread over its
block, is what is rounded. It costs log2(size) additions a channel at each run.

Source: Ashkboos et al. 2024, QuaRot (arXiv:2404.00456), section 4, stages 1c and 1d, without its
factor of odd sizes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pennyweight import kernels as kernels  # the op `hadamard`
from pennyweight.kernels.reference import hadamard
from pennyweight.llm.absorb import makers
from pennyweight.llm.block import Group, Run, groups_of, linears
from pennyweight.llm.rotate import check_same
from pennyweight.llm.skeleton import put_module


class TurnsInputs(nn.Module):
    """A layer that is called with x and given `H x`: whoever looks at its inputs, by hooks, sees these.

    Attributes:
        hadamard: size of the blocks of H.
    """

    hadamard: int = 1

    def __call__(self, x: Tensor) -> Any:
        """Turn, then what any module does."""
        return super().__call__(hadamard(x, self.hadamard))


class TurnedLinear(TurnsInputs, nn.Linear):
    """`y = W' (H x) + b`. x [..., in] -> [..., out].

    Args:
        layer: whose weight W becomes `W' = W H`; its bias is shared.
        size: of the blocks of H, a power of two that divides the inputs.
    """

    def __init__(self, layer: nn.Linear, size: int) -> None:
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        self.hadamard = size
        self._parameters["weight"] = nn.Parameter(hadamard(layer.weight.detach(), size), requires_grad=False)
        self._parameters["bias"] = layer._parameters.get("bias")


class Turned(nn.Module):
    """A quantized layer behind a Hadamard transform. x [..., in] -> [..., out]."""

    def __init__(self, layer: nn.Module, size: int) -> None:
        super().__init__()
        self.layer, self.size = layer, size

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        y: Tensor = self.layer(torch.ops.pennyweight.hadamard(x, self.size))
        return y


def blocks_of(inputs: int) -> int:
    """Size of the blocks for so many inputs: their largest factor that is a power of two."""
    return inputs & -inputs


def turn_inputs(block: nn.Module, run: Run, hidden: Tensor) -> dict[str, nn.Linear]:
    """Turn what those layers of a block read that share their input with no other and read no norm.

    In a Llama these are the last layers of attention and of the MLP. The block then computes what it did.

    Args:
        block: with float weights; its layers are replaced.
        run: a block and hidden states to its result.
        hidden: some hidden states, [windows, length, width].

    Returns:
        The layers that stood there, by path.

    Raises:
        GraphError: if the block then computes something else.
    """
    want = run(block, hidden)
    layers = linears(block)
    replaced: dict[str, nn.Linear] = {}
    for group in groups_of(block, run, hidden, set(layers)):
        (name, *others) = group.names
        normed = any(m.kind == "norm" for m in makers(block, run, hidden, Group(group.names)))
        size = blocks_of(layers[name].in_features)
        if not others and not normed and size > 1:
            replaced[name] = layers[name]
            put_module(block, name, TurnedLinear(layers[name], size))
    apart = run(block, hidden) - want
    check_same(want, apart, hidden, "turning inputs", type(block).__name__, "Leave --hadamard out.")
    return replaced

"""Rotated hidden states: outliers in a few channels become a little in all of them.

    RMSNorm(x Q) = RMSNorm(x) Q     for an orthogonal Q and a norm without weight

So the weight of each norm moves into the layers that read its output, these read `W Q`, layers that write into the
stream write `Q^T W`, and the token table and the output layer do the same. Which layers read and which write is seen
from a run; whether the block computes what it did, rotated, is checked on every block.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pennyweight.errors import GraphError
from pennyweight.llm.absorb import makers
from pennyweight.llm.block import Group, Run, groups_of, linears

CLOSE = 1e-4


def hadamard(n: int) -> Tensor:
    """The Hadamard matrix of a power of two, orthonormal, float64 [n, n]."""
    h = torch.ones(1, 1, dtype=torch.float64)
    while len(h) < n:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h / math.sqrt(n)


def cosines(n: int) -> Tensor:
    """The orthonormal cosine transform (type II), float64 [n, n]: for factors that no Hadamard matrix here has."""
    k, i = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(n, dtype=torch.float64)
    c = torch.cos(math.pi * (2 * i + 1) * k / (2 * n)) * math.sqrt(2 / n)
    c[0] /= math.sqrt(2)
    return c


def rotation(n: int, seed: int) -> Tensor:
    """An orthogonal matrix that spreads every channel over all: `diag(signs) (C_m x H_2^k)`, n = m 2^k. float64 [n, n].

    Source: Ashkboos et al. 2024, QuaRot (arXiv:2404.00456); for odd m the cosine transform stands in.
    """
    power = n & -n
    signs = torch.randint(0, 2, (n,), generator=torch.Generator().manual_seed(seed)).double() * 2 - 1
    return signs[:, None] * torch.kron(cosines(n // power), hadamard(power))


@dataclass(frozen=True)
class Roles:
    """Who reads the hidden states and who writes them.

    Attributes:
        norms: each norm's path, and the layers that read its output.
        writers: layers whose result is added to the hidden states.
    """

    norms: dict[str, list[str]]
    writers: list[str]


def roles(block: nn.Module, run: Run, hidden: Tensor) -> Roles:
    """Readers and writers of a block.

    Raises:
        GraphError: if no linear layer reads a norm without bias.
    """
    layers = linears(block)
    norms: dict[str, list[str]] = {}
    for group in groups_of(block, run, hidden, set(layers)):
        for maker in makers(block, run, hidden, Group(group.names)):
            if maker.kind == "norm":
                module = block.get_submodule(maker.path)
                if module._parameters.get("bias") is not None:
                    raise GraphError(
                        "rotation is for norms without mean and bias",
                        site=maker.path,
                        hint="Leave --rotate out.",
                    )
                norms.setdefault(maker.path, []).extend(group.names)
                break
    readers = {n for names in norms.values() for n in names}
    if not readers:
        raise GraphError(
            "no linear layer reads the output of a norm",
            site=type(block).__name__,
            hint="Leave --rotate out.",
        )
    width = hidden.shape[-1]
    return Roles(
        norms, [n for n, layer in layers.items() if n not in readers and layer.out_features == width]
    )


def rotate_block(block: nn.Module, run: Run, hidden: Tensor, q: Tensor) -> None:
    """Rotate a block in place; afterwards `block(x Q) = block(x) Q`.

    Args:
        block: with float weights.
        run: a block and hidden states to its result.
        hidden: some hidden states as the block knows them, [windows, length, width].
        q: [width, width], float64.

    Raises:
        GraphError: if the block then computes something else: its structure is not the one described above.
    """
    want = run(block, hidden)
    found = roles(block, run, hidden)
    for path, readers in found.norms.items():
        norm = block.get_submodule(path)
        gain = norm.get_parameter("weight").double()
        one = nn.Parameter(torch.ones_like(norm.get_parameter("weight")), requires_grad=False)
        for name in readers:
            put_weight(
                block.get_submodule(name),
                (block.get_submodule(name).get_parameter("weight").double() * gain) @ q,
            )
        norm._parameters["weight"] = one
    for name in found.writers:
        layer = block.get_submodule(name)
        put_weight(layer, q.T @ layer.get_parameter("weight").double())
        bias = layer._parameters.get("bias")
        if bias is not None:
            layer._parameters["bias"] = nn.Parameter((bias.double() @ q).float(), requires_grad=False)
    check_rotated(want, run(block, turned(hidden, q)), hidden, q, type(block).__name__)


def check_rotated(want: Tensor, got: Tensor, hidden: Tensor, q: Tensor, site: str) -> None:
    """Compare what a rotated block computes with what it computed.

    Raises:
        GraphError: if they differ by more than rounding.
    """
    check_same(want, got - turned(want, q), hidden, "rotation", site, "Leave --rotate out.")


def check_same(want: Tensor, apart: Tensor, hidden: Tensor, what: str, site: str, hint: str) -> None:
    """Refuse a change of a block after which its results `want` are `apart` by more than rounding.

    Raises:
        GraphError: naming what changes the block.
    """
    size = (want - hidden).pow(2).mean() + want.pow(2).mean() * 1e-2
    if float(apart.pow(2).mean()) > CLOSE**2 * float(size):
        raise GraphError(f"{what} changes what the block computes", site=site, hint=hint)


def turned(x: Tensor, q: Tensor) -> Tensor:
    """`x Q`, in float64, back to float32. x [..., n]."""
    return (x.double() @ q).float()


def put_weight(layer: nn.Module, weight: Tensor) -> None:
    """Give a layer another weight, float32."""
    layer._parameters["weight"] = nn.Parameter(weight.float().contiguous(), requires_grad=False)

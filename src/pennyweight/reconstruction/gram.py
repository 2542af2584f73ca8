"""The second moments of a layer's inputs, as its weight's matrix view meets them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from pennyweight.nn.conv import ConvTwin, pad_input
from pennyweight.nn.linear import LinearTwin
from pennyweight.reconstruction.capture import visit
from pennyweight.reconstruction.normals import Channels

PIECE = 1 << 21  # values of patches at a time; larger blocks are given back to the system and zeroed anew
LEAST = 4  # vectors at a time for each of their entries, so that products outweigh sums of squares


def has_rows(twin: nn.Module) -> bool:
    """Whether `pieces` knows how this layer's weight meets its inputs."""
    return isinstance(twin, LinearTwin) or (isinstance(twin, ConvTwin) and not twin.transposed)


def pieces(twin: Any, x: Tensor) -> tuple[int, Iterator[Tensor]]:
    """The vectors that rows of the weight's matrix view are multiplied with: how many, and [groups, n, in], some at a
    time, as patches take many times the memory of the input.

    x: the input, [..., in] of a linear layer, [N, C, *size] or [C, *size] of a convolution, which is unfolded into
    patches of C / groups channels times taps, in the order of the matrix view.
    """
    if isinstance(twin, LinearTwin):
        flat = x.reshape(-1, x.shape[-1])
        step = max(1, PIECE // flat.shape[1], LEAST * flat.shape[1])
        return len(flat), (part.unsqueeze(0) for part in flat.split(step))
    x, sizes = _padded(twin, x)
    places, width = math.prod(sizes), twin.in_channels * math.prod(twin.kernel_size)
    step = max(1, PIECE // max(places * width, 1), LEAST * width // (twin.groups * max(places, 1)))
    return len(x) * places, (_patches(twin, part, sizes) for part in x.split(step))


def _padded(twin: Any, x: Tensor) -> tuple[Tensor, list[int]]:
    """The input of a convolution with its borders, [N, C, *size], and the size of its result."""
    x, padding = pad_input(x if x.ndim == len(twin.kernel_size) + 2 else x.unsqueeze(0), twin)
    if any(padding):
        x = nn.functional.pad(x, [p for size in reversed(padding) for p in (size, size)])
    return x, [
        (n - d * (k - 1) - 1) // s + 1
        for n, k, s, d in zip(x.shape[2:], twin.kernel_size, twin.stride, twin.dilation, strict=True)
    ]


def _patches(twin: Any, x: Tensor, sizes: list[int]) -> Tensor:
    """[groups, n, in]; in memory every tap of a channel follows its places, so that they are copied as they lie."""
    taps, channels = list(product(*(range(k) for k in twin.kernel_size))), x.movedim(1, 0)
    found = x.new_empty(len(channels), len(taps), len(x), *sizes)
    for i, tap in enumerate(taps):
        part = channels
        for axis, (at, size) in enumerate(zip(tap, sizes, strict=True)):
            first, step = at * twin.dilation[axis], twin.stride[axis]
            part = part[(slice(None),) * (axis + 2) + (slice(first, first + (size - 1) * step + 1, step),)]
        found[:, i] = part
    return found.reshape(twin.groups, -1, len(x) * math.prod(sizes)).mT


def layer_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The input among the arguments of a layer's call."""
    found: Tensor = args[0] if args else kwargs["input"]
    return found


def rounded_input(twin: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The input of a call, rounded as the layer's input is, float32."""
    x = layer_input(args, kwargs)
    return (x if twin.input is None else twin.input(x)).float()


def input_gram(model: nn.Module, batches: Iterable[Any], twin: Any, *, once: bool = True) -> Tensor:
    """Mean of `x x^T` over the inputs of a layer, rounded as its input is, float64 [groups, in, in]; empty without any.

    The model runs as it is: with the weights that are solved by now, and the activations rounded that are active.
    """
    total, count = torch.zeros(0, dtype=torch.float64), 0

    def see(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal total, count
        seen, parts = pieces(twin, rounded_input(twin, args, kwargs))
        for x in parts:
            square = (x.mT @ x).double()
            total = total + square if total.numel() else square
        count += seen

    visit(model, batches, twin, see, once=once)
    return total / max(count, 1)


def expected_gram(twin: Any, channels: Channels, alike: float) -> Tensor:
    """The same without data, from means m and variances v of the input channels, float64 [groups, in, in].

        E[x_ca x_db] = m_c m_d + [c = d] v_c (alike + (1 - alike) [a = b])

    for channels c, d that have nothing to do with each other, and places a, b of a kernel whose values correlate by
    `alike`.
    """
    groups, taps = getattr(twin, "groups", 1), math.prod(getattr(twin, "kernel_size", (1,)))
    mean, variance = (v.reshape(groups, -1) for v in (channels.mean, channels.variance))
    near = torch.full((taps, taps), alike, dtype=torch.float64)
    near.fill_diagonal_(1.0)
    apart = torch.einsum("gc,cd,ab->gcadb", variance, torch.eye(mean.shape[1], dtype=torch.float64), near)
    size = mean.shape[1] * taps
    long = mean.repeat_interleave(taps, 1)  # [groups, in]
    return apart.reshape(groups, size, size) + long.unsqueeze(2) * long.unsqueeze(1)

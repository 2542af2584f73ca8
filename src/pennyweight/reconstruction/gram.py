"""The second moments of a layer's inputs, as its weight's matrix view meets them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from pennyweight.nn.conv import ConvTwin, pad_input
from pennyweight.nn.linear import LinearTwin
from pennyweight.reconstruction.capture import visit
from pennyweight.reconstruction.normals import Channels


def has_rows(twin: nn.Module) -> bool:
    """Whether `rows` knows how this layer's weight meets its inputs."""
    return isinstance(twin, LinearTwin) or (isinstance(twin, ConvTwin) and not twin.transposed)


def rows(twin: Any, x: Tensor) -> Tensor:
    """The vectors that rows of the weight's matrix view are multiplied with, [groups, n, in].

    x: the input, [..., in] of a linear layer, [N, C, *size] or [C, *size] of a convolution, which is unfolded into
    patches of C / groups channels times taps, in the order of the matrix view.
    """
    if isinstance(twin, LinearTwin):
        return x.reshape(1, -1, x.shape[-1])
    dims = len(twin.kernel_size)
    x, padding = pad_input(x if x.ndim == dims + 2 else x.unsqueeze(0), twin)
    x = nn.functional.pad(x, [p for size in reversed(padding) for p in (size, size)])
    sizes = [
        (n - d * (k - 1) - 1) // s + 1
        for n, k, s, d in zip(x.shape[2:], twin.kernel_size, twin.stride, twin.dilation, strict=True)
    ]
    taps = []
    for tap in product(*(range(k) for k in twin.kernel_size)):
        part = x
        for axis, (at, size) in enumerate(zip(tap, sizes, strict=True)):
            first, step = at * twin.dilation[axis], twin.stride[axis]
            part = part[(slice(None),) * (axis + 2) + (slice(first, first + (size - 1) * step + 1, step),)]
        taps.append(part)
    patches = torch.stack(taps, 2)  # [N, C, taps, *sizes]
    patches = patches.unflatten(1, (twin.groups, -1)).flatten(4)  # [N, groups, C / groups, taps, positions]
    vectors: Tensor = patches.permute(1, 0, 4, 2, 3).flatten(1, 2).flatten(2)
    return vectors


def layer_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The input among the arguments of a layer's call."""
    found: Tensor = args[0] if args else kwargs["input"]
    return found


def met(twin: Any, x: Tensor) -> Tensor:
    """`rows` of an input rounded as the layer's input is."""
    return rows(twin, (x if twin.input is None else twin.input(x)).float())


def input_gram(model: nn.Module, batches: Iterable[Any], twin: Any, *, once: bool = True) -> Tensor:
    """Mean of `x x^T` over the inputs of a layer, rounded as its input is, float64 [groups, in, in]; empty without any.

    The model runs as it is: with the weights that are solved by now, and the activations rounded that are active.
    """
    total, count = torch.zeros(0, dtype=torch.float64), 0

    def see(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal total, count
        x = met(twin, layer_input(args, kwargs))
        part = (x.mT @ x).double()
        total = part if not count else total + part
        count += x.shape[1]

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

"""Scales of a block's inputs, moved into the modules before them: AWQ's and SmoothQuant's."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pennyweight.llm.absorb import find_producer, scale_group, scale_producer
from pennyweight.llm.block import Group, Streams
from pennyweight.llm.schemes import Scheme
from pennyweight.qtensor import quantize
from pennyweight.ranges.mse import MSE
from pennyweight.spec import QuantSpec
from pennyweight.stats.values import Values

STEPS = 20


def awq_scale(weights: list[Tensor], specs: list[QuantSpec], gram: Tensor) -> Tensor:
    """The scale of least output error `sum_layers tr(D H D^T)`, `D = Q(W diag s) diag(1 / s) - W`, among

        s = r^a / sqrt(max r^a * min r^a),  r_i = sqrt(H_ii),  a = 0, 0.05, ... 0.95

    Shapes: weights [out, in] each, gram [in, in]; result [in].
    Source: Lin et al. 2023, AWQ (arXiv:2306.00978), equations 4 and 5, with the root mean square of the inputs for the
    mean of their magnitudes.
    """
    root = gram.diagonal().clamp_min(0.0).sqrt()
    root = root.clamp_min(float(root.max()) * 1e-4 + 1e-12)
    rule = MSE(steps=6, shrink=0.7)
    best, least = torch.ones_like(root), float("inf")
    for i in range(STEPS):
        s = root ** (i / STEPS)
        s = s / (s.max() * s.min()).sqrt()
        error = 0.0
        for w, spec in zip(weights, specs, strict=True):
            wide = w * s
            d = quantize(wide, spec, rule(Values.of(wide, spec), spec)).dequantize() / s - w
            error += float(torch.einsum("oi,oi->", d @ gram, d))
        if error < least:
            best, least = s, error
    return best


def smooth_scale(weights: list[Tensor], peak: Tensor, alpha: float) -> Tensor:
    """`s_j = max|x_j|^alpha / max|w_j|^(1 - alpha)`, over all layers that read x; 1 where an input is always zero.

    Shapes: weights [out, in] each, peak [in]; result [in].
    Source: Xiao et al. 2022, SmoothQuant (arXiv:2211.10438), equation 4.
    """
    most = torch.stack([w.abs().amax(0) for w in weights]).amax(0)
    s = (peak**alpha / most.clamp_min(1e-5) ** (1.0 - alpha)).clamp_min(1e-5)
    return torch.where((peak > 0) & (most > 0), s, torch.ones_like(s))


def scale_inputs(
    block: nn.Module,
    streams: Streams,
    groups: list[Group],
    schemes: dict[str, Scheme],
    *,
    smooth: float,
    awq: bool,
) -> dict[str, str]:
    """Scale the inputs of every group that something can absorb the scale of; the block computes what it did.

    Returns:
        The absorbing module by the first layer of each group.
    """
    absorbed = {}
    for group in groups:
        if group.low is None or group.high is None:
            continue
        producer = find_producer(block, streams.run, streams.batches[0][:1], group)
        if producer is None:
            continue
        weights = [block.get_submodule(n).get_parameter("weight").detach() for n in group.names]
        scale = torch.ones(weights[0].shape[1])
        if smooth > 0:
            scale = smooth_scale(weights, torch.maximum(-group.low, group.high), smooth)
            group.scaled(scale)
            weights = [w * scale for w in weights]
        if awq and group.gram is not None:
            more = awq_scale(weights, [schemes[n].weight for n in group.names], group.gram)
            group.scaled(more)
            scale = scale * more
        scale_producer(block, producer, 1.0 / scale)
        scale_group(block, group.names, scale)
        absorbed[group.names[0]] = producer.path
    return absorbed

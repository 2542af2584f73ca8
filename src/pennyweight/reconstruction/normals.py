"""What batch norms say of every tensor of a network: means, variances and reach by channel, without any data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pennyweight.graph import ops
from pennyweight.graph.graph import Graph, Node, Ref
from pennyweight.nn.conv import ConvTwin
from pennyweight.nn.linear import LinearTwin

_KEEPS = frozenset(
    """dropout dropout1d dropout2d identity contiguous detach clone to float max_pool1d max_pool2d max_pool3d mean
    avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool2d
    flatten view reshape getitem pad""".split()
)
REACH = 6.0  # standard deviations


@dataclass(frozen=True, slots=True)
class Channels:
    """Mean, variance and bounds of every channel, float64 [channels]."""

    mean: Tensor
    variance: Tensor
    lo: Tensor
    hi: Tensor

    @classmethod
    def normal(cls, mean: Tensor, deviation: Tensor, reach: float = REACH) -> Channels:
        """A normal distribution, cut off at `reach` standard deviations."""
        return cls(mean, deviation**2, mean - reach * deviation, mean + reach * deviation)

    def clipped(self, low: float, high: float) -> Channels:
        """What `clamp(x, low, high)` makes of it, taken for normal.

        a = (low - m) / d,  b = (high - m) / d,  P = Phi(b) - Phi(a)
        E[y]   = low Phi(a) + high (1 - Phi(b)) + m P + d (phi(a) - phi(b))
        E[y^2] = low^2 Phi(a) + high^2 (1 - Phi(b)) + (m^2 + d^2) P + 2 m d (phi(a) - phi(b))
                 + d^2 (a phi(a) - b phi(b))
        """
        m, d = self.mean, self.variance.sqrt().clamp_min(1e-12)
        # beyond 40 deviations both functions are 0 or 1 in float64
        a, b = (((torch.tensor(x, dtype=m.dtype) - m) / d).clamp(-40, 40) for x in (low, high))
        inside, slope = _area(b) - _area(a), _density(a) - _density(b)
        below, above = _area(a), 1 - _area(b)
        left = low if math.isfinite(low) else 0.0
        right = high if math.isfinite(high) else 0.0
        mean = left * below + right * above + m * inside + d * slope
        square = left**2 * below + right**2 * above + (m**2 + d**2) * inside + 2 * m * d * slope
        square = square + d**2 * (a * _density(a) - b * _density(b))
        return Channels(
            mean, (square - mean**2).clamp_min(0), self.lo.clamp(low, high), self.hi.clamp(low, high)
        )

    def plus(self, other: Channels, reach: float = REACH) -> Channels:
        """The sum of two that have nothing to do with each other."""
        mean, variance = self.mean + other.mean, self.variance + other.variance
        d = variance.sqrt()
        lo = torch.maximum(self.lo + other.lo, mean - reach * d)
        return Channels(mean, variance, lo, torch.minimum(self.hi + other.hi, mean + reach * d))


def _area(x: Tensor) -> Tensor:
    return 0.5 * torch.erfc(-x / math.sqrt(2))


def _density(x: Tensor) -> Tensor:
    return torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


def propagate(
    graph: Graph, model: nn.Module, outputs: Mapping[str, tuple[Tensor, Tensor]], reach: float = REACH
) -> dict[Ref, Channels]:
    """Distributions of all values that follow from layers with a folded norm.

    Behind the first of them, layers without a norm have `m' = W m + b` and `v' = W^2 v`. Sums are taken for sums of
    independent values; pools leave mean and variance alone.

    Args:
        graph: the recorded model.
        model: holds the twins of its layers.
        outputs: mean and standard deviation of the outputs of layers, by path.
        reach: standard deviations that a normal value stays within.
    """
    found: dict[Ref, Channels] = {}
    modules = dict(model.named_modules())
    for node in graph:
        own = _of_node(node, graph, modules, outputs, found, reach)
        if own is not None and len(node.outputs) == 1:
            found[Ref(node.id)] = own
    return found


def _of_node(
    node: Node,
    graph: Graph,
    modules: Mapping[str, nn.Module],
    outputs: Mapping[str, tuple[Tensor, Tensor]],
    found: Mapping[Ref, Channels],
    reach: float,
) -> Channels | None:
    if node.kind == "module" and node.path in outputs:
        return Channels.normal(*outputs[node.path], reach)
    refs = [r for r in node.inputs if r is not None]
    known = [found[r] for r in refs if r in found]
    if not known or len(known) < len(refs) or not node.outputs:
        return None
    x, shape = known[0], node.outputs[0].shape
    if node.kind == "module":
        return _through(modules.get(node.path), x, reach)
    if node.op == "add" and len(known) == 2 and not node.params:
        fits = len(known[0].mean) == len(known[1].mean)
        return known[0].plus(known[1], reach) if fits else None
    if node.op == "cat" and node.scalars.get(len(refs), 0.0) == 1:
        return Channels(
            *(torch.cat([getattr(k, n) for k in known]) for n in ("mean", "variance", "lo", "hi"))
        )
    if node.op == "relu":
        return x.clipped(0.0, math.inf)
    if node.op in ops.CLIPS:
        low, high = (0.0, 6.0) if node.op == "relu6" else (node.scalars.get(1), node.scalars.get(2))
        return None if low is None or high is None else x.clipped(low, high)
    if node.op in _KEEPS and len(shape) >= 2:
        return _moved(node, graph.value(refs[0]).shape, shape, x)
    return None


def _through(module: nn.Module | None, x: Channels, reach: float) -> Channels | None:
    """Behind a layer without a norm."""
    if not isinstance(module, LinearTwin | ConvTwin) or getattr(module, "transposed", False):
        return None
    weight, groups = module.weight.detach().double(), getattr(module, "groups", 1)
    channels = weight.shape[1] * groups
    if len(x.mean) != channels:
        return None
    taps = weight.flatten(2) if weight.ndim > 2 else weight.unsqueeze(-1)  # [out, in / groups, taps]
    own = [v.reshape(groups, -1).repeat_interleave(len(weight) // groups, 0) for v in (x.mean, x.variance)]
    mean = (taps.sum(-1) * own[0]).sum(1)
    if module.bias is not None:
        mean = mean + module.bias.detach().double()
    return Channels.normal(mean, ((taps**2).sum(-1) * own[1]).sum(1).sqrt(), reach)


def _moved(node: Node, before: tuple[int, ...], after: tuple[int, ...], x: Channels) -> Channels | None:
    """Where channels keep their places, are zero-padded, or are spread over what was space."""
    count = len(x.mean)
    if before[1] != count:
        return None
    if after[1] == count:
        return x
    parts = [x.mean, x.variance, x.lo, x.hi]
    if node.op == "pad" and len(before) == 4 and len(after) == 4:
        front, back = int(node.scalars.get(5, 0)), int(node.scalars.get(6, 0))
        if front + count + back != after[1]:
            return None
        return Channels(*(torch.nn.functional.pad(p, (front, back)) for p in parts))
    if node.op in ("flatten", "view", "reshape") and len(after) == 2 and after[1] % count == 0:
        return Channels(*(p.repeat_interleave(after[1] // count) for p in parts))
    return None

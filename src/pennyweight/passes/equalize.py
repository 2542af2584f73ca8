"""Cross-layer equalization: give the channels between two layers like ranges on both sides."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from pennyweight.errors import EmptyCalibration
from pennyweight.graph.links import Link, links
from pennyweight.graph.record import call
from pennyweight.nn.conv import ConvTwin
from pennyweight.nn.linear import LinearTwin
from pennyweight.nn.sites import aside
from pennyweight.passes import Context, Normal, Stage, parameter_like, passes
from pennyweight.plan import LayerPlan

LEAST, MOST = 2.0**-16, 2.0**16  # bounds of a factor


@passes.register("equalize")
@dataclass(frozen=True)
class Equalize:
    """Scale channel i between two layers so that its largest weights on both sides are of one size.

        r1_i = max |W1[i, :]|,  r2_i = max |W2[:, i]|,  s_i = sqrt(r1_i / r2_i)
        W1[i, :] /= s_i,  b1_i /= s_i,  W2[:, i] *= s_i

    over all pairs of layers with nothing but positively homogeneous operations in between, in turns until nothing
    moves; a depthwise layer is the second of one pair and the first of the next, so that all three ranges of a channel
    end up alike. Several layers that read the same channels count as one. Channels without weights on one side stay.

    Where values are clipped at c (ReLU6, c = 6) the function is kept: with m_i the greatest value that channel i takes
    before the clip, it is scaled only if `m_i < c`, and only by `s_i >= m_i / c`. m_i is `mean + sigmas * deviation` of
    the folded batch norm, or, where there was none, what the batches show.

    Args:
        iterations: rounds over all pairs.
        sigmas: see above.

    Source: Nagel et al. 2019 (arXiv:1906.04721), section 4.1; instead of replacing ReLU6, factors are bounded here.
    """

    iterations: int = 40
    sigmas: float = 4.0
    stage: ClassVar[Stage] = "adapt"
    preserves_output: ClassVar[bool] = True
    replays: ClassVar[bool] = True
    data_free: ClassVar[bool] = True

    def needs(self) -> set[str]:
        """Nothing."""
        return set()

    def run(self, context: Context) -> None:
        """Scale; one `equalize` event a pair, with the least and the greatest factor."""
        twins = scalable(context.model)
        found = [link for link in links(context.graph, twins) if not link.norm]
        tops = {link.producer: top for link, top in greatest(context, found, twins, self.sigmas).items()}
        total = {link.producer: torch.ones(rows(twins[link.producer]), dtype=torch.float64) for link in found}
        for _ in range(self.iterations):
            moved = 0.0
            for link in found:
                first, others = twins[link.producer], [twins[p] for p in link.consumers]
                r1 = row_sizes(first)
                r2 = torch.stack([column_sizes(t) for t in others]).amax(0)
                s = torch.sqrt(r1 / r2)
                s = torch.where((r1 > 0) & (r2 > 0), s, torch.ones_like(s)).clamp(LEAST, MOST)
                if math.isfinite(link.limit):
                    s = bounded(s, tops[link.producer], link.limit)
                    tops[link.producer] = tops[link.producer] / s
                scale(context, link, twins, s)
                total[link.producer] /= s
                moved = max(moved, float(s.log().abs().max()))
            if moved < 1e-4:
                break
        for link in found:
            factor = total[link.producer]
            context.journal.add(
                "equalize",
                link.producer,
                readers=", ".join(link.consumers),
                least=float(factor.min()),
                greatest=float(factor.max()),
                still=int((factor == 1).sum()),
            )


def bounded(s: Tensor, tops: Tensor, limit: float) -> Tensor:
    """The factors that a clip at `limit` allows: `s_i >= tops_i / limit`, and 1 where it is reached."""
    free = torch.maximum(s, (tops / limit).clamp_min(LEAST))
    return torch.where(tops < limit, free, torch.ones_like(s))


def scalable(model: nn.Module) -> dict[str, Any]:
    """Twins of linear layers and convolutions by path."""
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, LinearTwin | ConvTwin)
        and isinstance(module.layer, LayerPlan)
        and not getattr(module, "transposed", False)
    }


def rows(twin: Any) -> int:
    """Output channels."""
    return int(twin.weight.shape[0])


def row_sizes(twin: Any) -> Tensor:
    """Largest weight of every output channel, float64 [out]."""
    return cast("Tensor", twin.weight).detach().double().flatten(1).abs().amax(1)


def column_sizes(twin: Any) -> Tensor:
    """Largest weight of every input channel, float64 [in]."""
    return _by_input(twin).abs().amax(-1)


def _by_input(twin: Any) -> Tensor:
    """Weights by input channel, float64 [in, out / groups * taps]."""
    weight, groups = twin.weight.detach().double(), getattr(twin, "groups", 1)
    parts = weight.unflatten(0, (groups, -1)).movedim(2, 1)  # [groups, in / groups, out / groups, *taps]
    return cast("Tensor", parts.flatten(0, 1).flatten(1))


def scale(context: Context, link: Link, twins: dict[str, Any], s: Tensor) -> None:
    """Divide the producer's output channels by s, float64 [channels], and multiply the consumers' inputs with it.

    Weights are replaced by new parameters: the user's model keeps its own.
    """
    if link.norm:
        owner = context.model.get_submodule(link.producer)
        for name in ("weight", "bias"):
            old = owner._parameters.get(name)
            if old is not None:
                owner._parameters[name] = parameter_like(old, old.detach().double() / s)
    else:
        first = twins[link.producer]
        first.weight = parameter_like(
            first.weight, first.weight.detach().double() / _along(s, first.weight, 0)
        )
        if first.bias is not None:
            first.bias = parameter_like(first.bias, first.bias.detach().double() / s)
        if link.producer in context.outputs:
            normal = context.outputs[link.producer]
            context.outputs[link.producer] = Normal(normal.mean / s, normal.deviation / s)
    for path in link.consumers:
        twin = twins[path]
        groups = getattr(twin, "groups", 1)
        parts = (
            twin.weight.detach().double().unflatten(0, (groups, -1))
        )  # [groups, out / groups, in / groups, ...]
        factor = s.reshape(groups, 1, -1, *[1] * (parts.ndim - 3))
        twin.weight = parameter_like(twin.weight, (parts * factor).flatten(0, 1))


def _along(s: Tensor, weight: Tensor, axis: int) -> Tensor:
    return s.reshape(*[1] * axis, -1, *[1] * (weight.ndim - axis - 1))


def greatest(
    context: Context, found: Iterable[Link], twins: dict[str, Any], sigmas: float, *, clipped: bool = True
) -> dict[Link, Tensor]:
    """The greatest value of every output channel of the producers, before anything is clipped, float64 [channels].

    From the norms where they are known, else from the batches; with `clipped` of those links alone that have a limit.
    """
    out: dict[Link, Tensor] = {}
    unknown: list[Link] = []
    for link in found:
        if clipped and not math.isfinite(link.limit):
            continue
        if link.producer in context.outputs:
            normal = context.outputs[link.producer]
            out[link] = normal.mean + sigmas * normal.deviation
        else:
            unknown.append(link)
    if unknown:
        seen = channel_extremes(context, {link.producer: twins[link.producer] for link in unknown})
        out.update({link: seen[link.producer][1] for link in unknown})
    return out


def channel_extremes(context: Context, modules: dict[str, nn.Module]) -> dict[str, tuple[Tensor, Tensor]]:
    """Least and greatest output of every channel over the batches, by path, float64 [channels].

    Raises:
        EmptyCalibration: if there is no batch.
    """
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    handles = []
    for path, module in modules.items():

        def after(m: nn.Module, args: Any, result: Tensor, path: str = path) -> None:
            axis = 1 if isinstance(m, ConvTwin) else result.ndim - 1
            with aside():
                values = result.detach().double().movedim(axis, 0).flatten(1)
                lo, hi = values.amin(1), values.amax(1)
                if path in seen:
                    lo, hi = torch.minimum(lo, seen[path][0]), torch.maximum(hi, seen[path][1])
                seen[path] = (lo, hi)

        handles.append(module.register_forward_hook(after))
    try:
        with torch.no_grad():
            for batch in context.inputs():
                call(context.model, batch)
    finally:
        for handle in handles:
            handle.remove()
    if len(seen) < len(modules):
        raise EmptyCalibration(
            "no batch shows how far channels reach", hint="Pass an example, or some inputs."
        )
    return seen

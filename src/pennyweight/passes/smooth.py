"""SmoothQuant: move the range of activations that stand out into the weights that read them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from pennyweight.errors import RecipeError
from pennyweight.graph.links import Link, links
from pennyweight.passes import Context, Stage, passes
from pennyweight.passes.equalize import LEAST, MOST, bounded, channel_extremes, column_sizes, scalable, scale


@passes.register("smooth")
@dataclass(frozen=True)
class Smooth:
    """Divide channel j of an activation by s_j where it is made, and multiply the weights that read it with s_j.

        s_j = max |x_j|^alpha / max |W_j|^(1 - alpha),  then all s by one factor so that the range stays

    W_j are the weights of all layers that read channel j (query, key and value together). What makes the activation is
    a layer norm, or (`producers = "all"`) also a linear layer or convolution with positively homogeneous operations
    behind it. A depthwise reader whose rows have scales of their own takes any factor for nothing: there alpha is 1.
    Where values are clipped, factors are bounded as in `equalize`, so that the function stays.

    Args:
        alpha: how much of the activations' spread goes into the weights.
        producers: "norms" or "all".

    Source: Xiao et al. 2022, "SmoothQuant" (arXiv:2211.10438), equation 4.
    """

    alpha: float = 0.5
    producers: Literal["norms", "all"] = "norms"
    stage: ClassVar[Stage] = "adapt"
    preserves_output: ClassVar[bool] = True
    replays: ClassVar[bool] = True

    def needs(self) -> set[str]:
        """Nothing.

        Raises:
            RecipeError: on an alpha that is no share, or other producers.
        """
        if not 0 <= self.alpha <= 1 or self.producers not in ("norms", "all"):
            raise RecipeError(
                f"alpha = {self.alpha}, producers = {self.producers!r}",
                hint="alpha lies between 0 and 1, producers are 'norms' or 'all'.",
            )
        return set()

    def run(self, context: Context) -> None:
        """Scale; one `smooth` event for every producer, with the least and the greatest divisor."""
        twins = scalable(context.model)
        found = [link for link in links(context.graph, twins) if link.norm or self.producers == "all"]
        modules = {link.producer: context.model.get_submodule(link.producer) for link in found}
        seen = channel_extremes(context, modules) if modules else {}  # a link changes no other link's values
        for link in found:
            s = self._factors(link, twins, *seen[link.producer])
            scale(context, link, twins, s)
            context.journal.add("smooth", link.producer, least=float(s.min()), greatest=float(s.max()))

    def _factors(self, link: Link, twins: dict[str, Any], lo: Tensor, hi: Tensor) -> Tensor:
        size = hi.clamp(0, link.limit) if link.rectified else torch.maximum(hi.abs(), lo.abs())
        readers = [twins[p] for p in link.consumers]
        weight = torch.stack([column_sizes(t) for t in readers]).amax(0)
        alpha = 1.0 if all(_free(t) for t in readers) else self.alpha
        s = size.clamp_min(1e-5) ** alpha / weight.clamp_min(1e-5) ** (1 - alpha)
        s = s * ((size / s).max() / size.max().clamp_min(1e-5))
        s = torch.where((size > 0) & (weight > 0), s, torch.ones_like(s)).clamp(LEAST, MOST)
        return bounded(s, hi, link.limit) if math.isfinite(link.limit) else s


def _free(twin: nn.Module) -> bool:
    """Whether a factor on an input channel is taken in by scales of rows: depthwise, not one scale for all."""
    layer: Any = twin.layer
    groups = getattr(twin, "groups", 1)
    depthwise = groups > 1 and groups == getattr(twin, "in_channels", 0)
    return depthwise and layer.weight is not None and not layer.weight.per_tensor

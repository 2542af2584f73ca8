"""SmoothQuant: move the range of activations that stand out into the weights that read them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from pennyweight.errors import RecipeError
from pennyweight.graph.links import Link, links
from pennyweight.passes import Context, Stage, passes
from pennyweight.passes.equalize import LEAST, MOST, bounded, channel_extremes, column_sizes, scalable, scale
from pennyweight.passes.trial import held_out
from pennyweight.progress import track
from pennyweight.reconstruction.results import first_batches


@passes.register("smooth")
@dataclass(frozen=True)
class Smooth:
    """Divide channel j of an activation by s_j where it is made, and multiply the weights that read it with s_j.

        s_j = max |x_j|^alpha / max |W_j|^(1 - alpha),  then all s by one factor so that the range stays

    W_j are the weights of all layers that read channel j (query, key and value together). What makes the activation is
    a layer norm, or (`producers = "all"`) also a linear layer or convolution with positively homogeneous operations
    behind it. A depthwise reader whose rows have scales of their own takes any factor for nothing: there alpha is 1.
    Where values are clipped, factors are bounded as in `equalize`, so that the function stays.

    With `weights = false` the activations alone decide, s_j = max |x_j|^alpha everywhere: alpha = 0 changes nothing.

    Channels as large as the largest have no room for inputs that go further than those seen; how much evening out
    that is worth is a matter of the network. Of several alphas the one is taken that leaves the least error on inputs
    held out (`passes.trial`).

    Args:
        alpha: how much of the activations' spread goes into the weights; one, or several to choose from.
        producers: "norms" or "all".
        weights: whether the sizes of the weights count.
        samples: of the calibration data, to choose on.

    Source: Xiao et al. 2022, "SmoothQuant" (arXiv:2211.10438), equation 4; the choice is our own.
    """

    alpha: float | tuple[float, ...] = 0.5
    producers: Literal["norms", "all"] = "norms"
    weights: bool = True
    samples: int = 128
    stage: ClassVar[Stage] = "adapt"
    preserves_output: ClassVar[bool] = True
    replays: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """A list of a recipe's text becomes a tuple, so that recipes can be compared."""
        if isinstance(self.alpha, Iterable):
            object.__setattr__(self, "alpha", tuple(self.alpha))

    def needs(self) -> set[str]:
        """Nothing.

        Raises:
            RecipeError: on an alpha that is no share, none, or other producers.
        """
        if not self._alphas or self.producers not in ("norms", "all") or self.samples < 1:
            raise RecipeError(
                f"alpha = {self.alpha}, producers = {self.producers!r}, samples = {self.samples}",
                hint="Alphas lie between 0 and 1, producers are 'norms' or 'all', samples are one or more.",
            )
        return set()

    @property
    def _alphas(self) -> tuple[float, ...]:
        """Those to choose from; none if one of them is no share."""
        found = self.alpha if isinstance(self.alpha, tuple) else (self.alpha,)
        return found if all(0 <= alpha <= 1 for alpha in found) else ()

    def run(self, context: Context) -> None:
        """Scale; one `smooth` event for every producer, with the least and the greatest divisor.

        Where alphas are to be chosen from, an `alpha` event holds the chosen one and the error in dB of each.
        """
        chosen, *others = self._alphas
        if others and _smoothable(context, self.producers)[1]:
            chosen = self._choose(context)
        self._scale(context, chosen)

    def _choose(self, context: Context) -> float:
        batches = first_batches(context.batches, "smooth", self.samples)
        changes = [partial(self._scale, alpha=alpha) for alpha in self._alphas]
        bar = track(changes, "choose alpha", total=len(changes), show=context.progress)
        errors = dict(zip(self._alphas, held_out(context, bar, batches), strict=True))
        chosen = min(errors, key=errors.__getitem__)
        decibels = {str(a): round(10 * math.log10(max(e, 1e-30)), 2) for a, e in errors.items()}
        context.journal.add("alpha", "", chosen=chosen, **decibels)
        return chosen

    def _scale(self, context: Context, alpha: float) -> None:
        twins, found = _smoothable(context, self.producers)
        if not found or (alpha == 0 and not self.weights):
            return
        modules = {link.producer: context.model.get_submodule(link.producer) for link in found}
        seen = channel_extremes(context, modules)  # a link changes no other link's values
        for link in found:
            s = self._factors(link, twins, alpha, *seen[link.producer])
            scale(context, link, twins, s)
            context.journal.add("smooth", link.producer, least=float(s.min()), greatest=float(s.max()))

    def _factors(self, link: Link, twins: dict[str, Any], alpha: float, lo: Tensor, hi: Tensor) -> Tensor:
        size = hi.clamp(0, link.limit) if link.rectified else torch.maximum(hi.abs(), lo.abs())
        readers = [twins[p] for p in link.consumers]
        weight = torch.stack([column_sizes(t) for t in readers]).amax(0)
        s = size.clamp_min(1e-5)
        if not self.weights:
            s = s**alpha
        elif not all(_free(t) for t in readers):
            s = s**alpha / weight.clamp_min(1e-5) ** (1 - alpha)
        s = s * ((size / s).max() / size.max().clamp_min(1e-5))
        s = torch.where((size > 0) & (weight > 0), s, torch.ones_like(s)).clamp(LEAST, MOST)
        return bounded(s, hi, link.limit) if math.isfinite(link.limit) else s


def _smoothable(context: Context, producers: str) -> tuple[dict[str, Any], list[Link]]:
    twins = scalable(context.model)
    return twins, [link for link in links(context.graph, twins) if link.norm or producers == "all"]


def _free(twin: nn.Module) -> bool:
    """Whether a factor on an input channel is taken in by scales of rows: depthwise, not one scale for all."""
    layer: Any = twin.layer
    groups = getattr(twin, "groups", 1)
    depthwise = groups > 1 and groups == getattr(twin, "in_channels", 0)
    return depthwise and layer.weight is not None and not layer.weight.per_tensor

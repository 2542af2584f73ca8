"""Batch norms that take part of their statistics from the data the network will see."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pennyweight.errors import RecipeError
from pennyweight.graph import Graph
from pennyweight.nn.conv import backward_weight, forward_weight
from pennyweight.nn.live_norm import LiveNorm
from pennyweight.passes import Context, Normal, Stage, parameter_like, passes
from pennyweight.passes.fold_batch_norm import distribution, factor_and_shift
from pennyweight.progress import track
from pennyweight.reconstruction.capture import output_moments
from pennyweight.reconstruction.replay import Replay
from pennyweight.stats.moments import Moments


@passes.register("adapt_norms")
@dataclass(frozen=True)
class AdaptNorms:
    """Mean and variance of every batch norm, moved toward those of the calibration data.

        m' = (1 - share) m + share E[x],  v' = (1 - share) v + share V[x]

    layer by layer in the order they run, each behind those adapted before it, so that what a layer sends on is what the
    next one is adapted to. For a network that is used on other inputs than it was trained on (another camera, another
    compression): its function changes, mostly for the better there, and float is no longer what the result is near to.
    On the inputs of its training it gains nothing. A share of 1 trusts the calibration data alone, which takes
    thousands of images.

    A norm that was folded into its layer says what it expected there, N(b, d^2) for each channel, and the layer's
    weights and bias take the change (eps counting as part of the variance):

        y' = r (y - b - share (E[y] - b)) + b,  r = 1 / sqrt(1 + share (V[y] / d^2 - 1))

    Args:
        share: of the calibration data in the statistics; n / (N + n) with n inputs against a weight of N for what is
            known.

    Source: Schneider et al. 2020, "Improving robustness against common corruptions by covariate shift adaptation"
    (arXiv:2006.16971), section 2.
    """

    share: float = 0.1
    stage: ClassVar[Stage] = "adapt"
    preserves_output: ClassVar[bool] = False
    replays: ClassVar[bool] = True

    def needs(self) -> set[str]:
        """Nothing.

        Raises:
            RecipeError: on a share that is none.
        """
        if not 0 < self.share <= 1:
            raise RecipeError(f"share = {self.share}", hint="Above 0, at most 1; 0.1 is the default.")
        return set()

    def run(self, context: Context) -> None:
        """Adapt; one `adapt norm` event each, with how far off the norm was.

        Its `shift` is the root mean square of (E[y] - b) / d over channels, `least` and `greatest` are of
        sqrt(V[y]) / d.

        Raises:
            RecipeError: in a recipe that trains.
            EmptyCalibration: if there is no batch.
        """
        model, graph = context.model, context.graph
        if any(isinstance(m, LiveNorm) for m in model.modules()):
            raise RecipeError(
                "adapt_norms in a recipe that trains: its norms are alive",
                hint="Train on the data, or call reestimate_batch_norm afterwards.",
            )
        modules = dict(model.named_modules())
        found = {
            node.path: modules[node.path]
            for node in graph
            if node.kind == "module"
            and (node.path in context.outputs or isinstance(modules.get(node.path), _BatchNorm))
        }
        if not found:
            context.journal.add("note", text="adapt_norms: the model has no batch norms")
        replay = Replay(model, graph, context.inputs, found)
        for path, module in track(found.items(), "adapt norms", total=len(found), show=context.progress):
            if not _statistics(graph, path, module):
                context.journal.add(
                    "norm not adapted", path, reason="it has no statistics, or more than one call"
                )
                continue
            with replay.running():
                seen = output_moments(model, replay.batches(), {path: module}, stop=True)[path]
            folded = context.outputs.get(path)
            expected = distribution(module) if folded is None else folded
            if folded is None:
                self._into_norm(module, expected, seen)
            else:
                context.outputs[path] = self._into_layer(module, expected, seen)
            _report(context, path, expected, seen)
            replay.settle(path)

    def _ratio(self, expected: Normal, seen: Moments) -> Tensor:
        """`r`, 1 for channels that a norm holds constant."""
        alive = expected.deviation > 0
        spread = seen.variance / torch.where(alive, expected.deviation, 1.0) ** 2
        return torch.where(alive, (1 + self.share * (spread - 1)).rsqrt(), 1.0)

    def _into_layer(self, twin: Any, expected: Normal, seen: Moments) -> Normal:
        """Weights and bias of a layer that a norm was folded into; what it now sends."""
        r, off = self._ratio(expected, seen), seen.mean - expected.mean
        transposed, groups = getattr(twin, "transposed", False), getattr(twin, "groups", 1)
        rows = forward_weight(twin.weight.detach(), transposed, groups).double()
        weight = backward_weight(rows * r.reshape(-1, *[1] * (rows.ndim - 1)), transposed, groups)
        bias = r * (twin.bias.detach().double() - expected.mean - self.share * off) + expected.mean
        _set(twin, "weight", weight)
        _set(twin, "bias", bias)
        return Normal(expected.mean + r * (1 - self.share) * off, r * seen.variance.sqrt())

    def _into_norm(self, norm: Any, expected: Normal, seen: Moments) -> None:
        """The statistics of a norm that stands alone; they are this model's own."""
        mean, var = norm.running_mean.double(), norm.running_var.double()
        factor, _ = factor_and_shift(norm, None)
        alive = factor != 0
        safe = torch.where(alive, factor, 1.0)
        mean += torch.where(alive, self.share * (seen.mean - expected.mean) / safe, 0.0)
        var += torch.where(alive, self.share * (seen.variance / safe**2 - var), 0.0)
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(var)


def _statistics(graph: Graph, path: str, module: nn.Module) -> bool:
    """Whether a norm in eval mode has statistics, for one call."""
    known = not isinstance(module, _BatchNorm) or (module.running_mean is not None and not module.training)
    return known and len(graph.modules(path)) == 1


def _set(twin: Any, name: str, new: Tensor) -> None:
    """A parameter, or what is stored in 16 bits."""
    old = getattr(twin, name)
    setattr(twin, name, parameter_like(old, new) if isinstance(old, nn.Parameter) else new.to(old.dtype))


def _report(context: Context, path: str, expected: Normal, seen: Moments) -> None:
    alive = expected.deviation > 0
    if not bool(alive.any()):
        return
    off = ((seen.mean - expected.mean) / expected.deviation)[alive]
    spread = (seen.variance.sqrt() / expected.deviation)[alive]
    context.journal.add(
        "adapt norm",
        path,
        shift=float(off.pow(2).mean().sqrt()),
        least=float(spread.min()),
        greatest=float(spread.max()),
    )

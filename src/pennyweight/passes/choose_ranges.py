"""Ranges of activations chosen one by one, by what each does to the network's result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from pennyweight.errors import RecipeError
from pennyweight.graph.record import call
from pennyweight.nn.fake import ActivationQuantizer
from pennyweight.passes import Context, Stage, passes
from pennyweight.passes.calibrate import Calibrate, merged, quantizers
from pennyweight.progress import track
from pennyweight.qtensor import QParams
from pennyweight.reconstruction.capture import floating
from pennyweight.reconstruction.replay import Replay
from pennyweight.reconstruction.results import divergence, first_batches
from pennyweight.reconstruction.samples import first_tensor

CANDIDATES: tuple[Mapping[str, Any], ...] = (
    {"range": "minmax"},
    {"range": "percentile", "options": {"p": 0.999999}},
    {"range": "percentile", "options": {"p": 0.99999}},
    {"range": "mse"},
)
ALIKE = 0.01  # ranges that differ by less are tried once


@passes.register("choose_ranges")
@dataclass(frozen=True)
class ChooseRanges:
    """For each site the range rule under which the network's result stays nearest to float's, this site alone rounded.

        rule* = argmin_r D(f(x), f(x; site rounded in the range of rule r))

    Which values may be clipped is not to be read off a site's own values: the largest ones of a late layer decide the
    class and want the whole range, those of an early one are noise to the layers behind, and a step too wide for the
    rest costs more. D is the divergence of the softmax from float's where the result has two axes, and the mean
    squared error otherwise; labels are not needed. Sites that share a scale are chosen together. Each trial runs the
    samples from the site to the end.

    Args:
        candidates: tables of `range` and `options`, as `calibrate` takes them; of equals the first wins.
        samples: batches of the calibration data to measure on, until there are so many samples.

    Source: our own; the loss and its use for ranges, chosen jointly there: Nahshan et al. 2019, "Loss Aware
    Post-training Quantization" (arXiv:1911.07190).
    """

    candidates: tuple[Mapping[str, Any], ...] = CANDIDATES
    samples: int = 128
    stage: ClassVar[Stage] = "calibrate"
    preserves_output: ClassVar[bool] = False
    replays: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Lists of a recipe's text become tuples, so that recipes can be compared."""
        object.__setattr__(self, "candidates", tuple(dict(c) for c in self.candidates))

    def steps(self) -> list[Calibrate]:
        """One step of a single rule for each candidate.

        Raises:
            RecipeError: if there is none, or one has other keys.
        """
        extra = sorted({key for c in self.candidates for key in c} - {"range", "options"})
        if extra or not self.candidates:
            raise RecipeError(
                f"unknown key {extra[0]!r} of a candidate" if extra else "there is no candidate for a range",
                hint='Write candidates = [{ range = "minmax" }, { range = "percentile", options = { p = 0.9999 } }].',
            )
        return [Calibrate(**c) for c in self.candidates]

    def needs(self) -> set[str]:
        """What the rules read."""
        return {name for step in self.steps() for name in step.needs()}

    def run(self, context: Context) -> None:
        """Set scale and zero point of every site; one `range` event each, as `calibrate` has them.

        Raises:
            EmptyCalibration: if a site saw no value, or there is no batch.
        """
        steps, found = self.steps(), quantizers(context.model)
        leaders = merged(context, self.needs())
        groups: dict[str, list[ActivationQuantizer]] = {}
        for site, quantizer in found.items():
            groups.setdefault(leaders.get(site, site), []).append(quantizer)
        trials = {site: [found[site].solve(step.rule()) for step in steps] for site in groups}
        best = self._best(context, groups, leaders, trials)
        for site, quantizer in found.items():
            leader = leaders.get(site, site)
            steps[best[leader]].settle(context, quantizer, found[leader], trials[leader][best[leader]])

    def _best(
        self,
        context: Context,
        groups: Mapping[str, list[ActivationQuantizer]],
        leaders: Mapping[str, str],
        trials: Mapping[str, list[QParams]],
    ) -> dict[str, int]:
        """The number of the best candidate by leading site, in the order in which the network comes to the sites."""
        model, batches = context.model, first_batches(context.batches, "choose_ranges", self.samples)
        nodes, best = [n for n in context.graph if n.name in context.plan.layers], dict.fromkeys(groups, 0)
        replay = Replay(model, context.graph, lambda: batches, [n.name for n in nodes])
        with floating(model), torch.no_grad():
            wanted = [first_tensor(call(model, b)) for b in batches]
            pending = set(groups)
            for node in track(nodes, "choose ranges", total=len(nodes), show=context.progress):
                sites = [str(s) for s in context.plan[node.name].sites()]
                here = {leaders.get(s, s) for s in sites} & pending
                for site in sorted(here):
                    pending.discard(site)
                    losses: list[float] = []
                    for i, params in enumerate(trials[site]):
                        same = [
                            loss
                            for loss, p in zip(losses, trials[site][:i], strict=True)
                            if _alike(params, p)
                        ]
                        losses.append(same[0] if same else self._loss(replay, wanted, groups[site], params))
                    best[site] = min(range(len(losses)), key=losses.__getitem__)
                if node.kind == "module" and len(context.graph.modules(node.path)) == 1:
                    replay.settle(node.path)
        return best

    def _loss(
        self, replay: Replay, wanted: list[Tensor], group: list[ActivationQuantizer], params: QParams
    ) -> float:
        """The divergence of the results with one group rounded, summed over batches by their samples."""
        for quantizer in group:
            quantizer.set(params)
            quantizer.active = True
        total = 0.0
        with replay.running():
            for batch, y in zip(replay.batches(), wanted, strict=True):
                total += float(divergence(y, first_tensor(call(replay.model, batch)))) * max(len(y), 1)
        for quantizer in group:
            quantizer.active = False
        return total


def _alike(a: QParams, b: QParams) -> bool:
    """Whether two ranges are one for all that matters."""
    near = bool(((a.scale - b.scale).abs() <= ALIKE * b.scale).all())
    return near and (a.zero is None or b.zero is None or torch.equal(a.zero, b.zero))

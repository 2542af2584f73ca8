"""From the statistics of the activations to their scales and zero points."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from pennyweight.graph.record import call
from pennyweight.nn.fake import ActivationQuantizer
from pennyweight.passes import Context, Stage, passes
from pennyweight.qtensor import QParams
from pennyweight.ranges import RangeRule, ranges


def quantizers(model: nn.Module) -> dict[str, ActivationQuantizer]:
    """All activation quantizers of a prepared model by site."""
    return {m.site: m for m in model.modules() if isinstance(m, ActivationQuantizer)}


def observe(model: nn.Module, needs: set[str], batches: Iterable[Any]) -> int:
    """Run batches through a prepared model and collect statistics of its activations; returns how many there were."""
    found = quantizers(model).values()
    for quantizer in found:
        quantizer.observe(needs)
    seen = 0
    with torch.no_grad():
        for seen, batch in enumerate(batches, 1):  # noqa: B007 (counted)
            call(model, batch)
    for quantizer in found:
        quantizer.observing = False
    return seen


@passes.register("calibrate")
@dataclass(frozen=True)
class Calibrate:
    """One range rule for every calibrated activation. Tied sites merge their statistics first.

    Args:
        range: name of a range rule.
        options: its options.
    """

    range: str = "minmax"
    options: dict[str, Any] = field(default_factory=dict)
    stage: ClassVar[Stage] = "calibrate"
    preserves_output: ClassVar[bool] = False

    def rule(self) -> RangeRule:
        """The range rule."""
        return ranges[self.range](**self.options)

    def needs(self) -> set[str]:
        """What the rule reads."""
        return {self.rule().needs}

    def run(self, context: Context) -> None:
        """Set scale and zero point of every site; one `range` event each.

        Raises:
            EmptyCalibration: if a site saw no value.
        """
        rule, found = self.rule(), quantizers(context.model)
        leaders = merged(context, self.needs())
        for site, quantizer in found.items():
            head = found[leaders.get(site, site)]
            self.settle(context, quantizer, head, head.solve(rule))

    def settle(
        self, context: Context, quantizer: ActivationQuantizer, head: ActivationQuantizer, params: QParams
    ) -> None:
        """Set a site's scale and zero point, which come from the statistics of `head`, and say so."""
        quantizer.set(params)
        statistic = head.statistics[self.rule().needs]
        context.journal.add(
            "range",
            quantizer.site,
            lo=float(statistic.lo),
            hi=float(statistic.hi),
            scale=float(quantizer.scale),
            zero=float(quantizer.zero),
            rule=self.range,
            tied="" if head is quantizer else head.site,
        )


def merged(context: Context, needs: set[str]) -> dict[str, str]:
    """Let the first site of each tied group take in what the others have seen; the first by site, of tied ones."""
    found = quantizers(context.model)
    leaders = {str(s): str(group[0]) for group in context.plan.ties for s in group}
    for site, quantizer in found.items():
        if leaders.get(site, site) != site:
            found[leaders[site]].merge(quantizer, needs)
    return leaders

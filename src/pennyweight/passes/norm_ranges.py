"""Ranges of activations from batch norms, without data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pennyweight.errors import EmptyCalibration
from pennyweight.graph.graph import Ref
from pennyweight.nn.fake import ActivationQuantizer
from pennyweight.passes import Context, Stage, passes
from pennyweight.passes.calibrate import quantizers
from pennyweight.ranges import params_of_range
from pennyweight.reconstruction.normals import Channels, propagate


def site_values(context: Context) -> dict[str, list[Ref]]:
    """The values that every planned site reads, by its name."""
    found: dict[str, list[Ref]] = {}
    for node in context.graph:
        layer = context.plan.layers.get(node.name) if node.kind in ("module", "call") else None
        for position in () if layer is None else layer.inputs:
            ref = node.inputs[position] if position < len(node.inputs) else None
            if layer is not None and ref is not None:
                found.setdefault(str(layer.input_site(position)), []).append(ref)
    return found


@passes.register("norm_ranges")
@dataclass(frozen=True)
class NormRanges:
    """`[min_c (m_c - n d_c), max_c (m_c + n d_c)]` with the mean and deviation that folded norms give channel c.

    Followed through activations, sums, pools and joins as `reconstruction.normals` says. Sites that no norm lies
    before, as the network's input, take the extremes of the batches, or of the example where there are no data. Sites
    that share a scale share a range.

    Args:
        sigmas: n.

    Source: Nagel et al. 2019 (arXiv:1906.04721), section 5.
    """

    sigmas: float = 6.0
    stage: ClassVar[Stage] = "calibrate"
    preserves_output: ClassVar[bool] = False
    data_free: ClassVar[bool] = True

    def needs(self) -> set[str]:
        """Extremes, for sites without a norm before them."""
        return {"minmax"}

    def run(self, context: Context) -> None:
        """Set scale and zero point of every site; one `range` event each.

        Raises:
            EmptyCalibration: if a site has neither a norm before it nor seen a value.
        """
        known = propagate(context.graph, context.model, context.outputs, self.sigmas)
        values, found = site_values(context), quantizers(context.model)
        ends: dict[str, tuple[Tensor, Tensor]] = {}
        rules: dict[str, str] = {}
        for site, quantizer in found.items():
            channels = [known[ref] for ref in values.get(site, []) if ref in known]
            all_known = bool(channels) and len(channels) == len(values[site])
            rules[site] = "norm" if all_known else "minmax"
            ends[site] = _reach(channels) if all_known else _seen(quantizer)
        for group in context.plan.ties:
            together = [ends[str(s)] for s in group if str(s) in ends]
            both = (
                torch.stack([e[0] for e in together]).amin(0),
                torch.stack([e[1] for e in together]).amax(0),
            )
            ends.update({str(s): both for s in group})
        for site, quantizer in found.items():
            lo, hi = ends[site]
            quantizer.set(params_of_range(lo, hi, quantizer.spec))
            context.journal.add(
                "range",
                site,
                lo=float(lo),
                hi=float(hi),
                scale=float(quantizer.scale),
                zero=float(quantizer.zero),
                rule=rules[site],
                tied="",
            )


def _reach(channels: list[Channels]) -> tuple[Tensor, Tensor]:
    lo = torch.stack([c.lo.amin() for c in channels]).amin()
    return lo.float(), torch.stack([c.hi.amax() for c in channels]).amax().float()


def _seen(quantizer: ActivationQuantizer) -> tuple[Tensor, Tensor]:
    statistic = quantizer.statistics.get("minmax")
    if statistic is None or not statistic.count:
        raise EmptyCalibration(
            "no batch norm lies before this site, and no value reached it", site=quantizer.site,
            hint="Pass an example or some inputs.",
        )  # fmt: skip
    return statistic.lo, statistic.hi

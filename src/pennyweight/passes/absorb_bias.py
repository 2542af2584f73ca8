"""High-bias absorption: move what every input has into the next layer's bias."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pennyweight.graph.links import links
from pennyweight.passes import Context, Normal, Stage, parameter_like, passes
from pennyweight.passes.equalize import scalable


@passes.register("absorb_bias")
@dataclass(frozen=True)
class AbsorbBias:
    """Behind a ReLU, a channel whose values are almost never below c is shifted by c, which the next layer adds again.

        c_i = max(0, m_i - n d_i);  b1_i -= c_i;  b2 += sum_i sum_taps W2[:, i] c_i

    m and d are what the folded norm gives channel i: after equalization some channels lie far from zero and would
    widen the range of all. Exact for values above c (99.865 % of a normal distribution at n = 3). Left alone are
    channels that a clip from above may reach, and channels that are padded with zeros on their way.

    Args:
        sigmas: n.

    Source: Nagel et al. 2019 (arXiv:1906.04721), section 4.1.3.
    """

    sigmas: float = 3.0
    stage: ClassVar[Stage] = "adapt"
    preserves_output: ClassVar[bool] = False
    data_free: ClassVar[bool] = True

    def needs(self) -> set[str]:
        """Nothing."""
        return set()

    def run(self, context: Context) -> None:
        """Shift; one `absorb` event for every layer that changes, with the number of channels."""
        twins = scalable(context.model)
        for link in links(context.graph, twins):
            normal = context.outputs.get(link.producer)
            if normal is None or link.norm or not link.rectified or link.padded:
                continue
            if any(_pads(twins[p]) for p in link.consumers):
                continue
            shift = (normal.mean - self.sigmas * normal.deviation).clamp_min(0)
            shift = torch.where(
                normal.mean + 6 * normal.deviation < link.limit, shift, torch.zeros_like(shift)
            )
            if not bool(shift.any()):
                continue
            first = twins[link.producer]
            first.bias = _moved(first.bias, first.weight, -shift)
            context.outputs[link.producer] = Normal(normal.mean - shift, normal.deviation)
            for path in link.consumers:
                twin = twins[path]
                gain = twin.expected(twin.weight.detach().double().flatten(1), shift)
                twin.bias = _moved(twin.bias, twin.weight, gain)
            context.journal.add(
                "absorb", link.producer, channels=int((shift > 0).sum()), largest=float(shift.max())
            )


def _pads(twin: Any) -> bool:
    padding = getattr(twin, "padding", ())
    return padding != "valid" if isinstance(padding, str) else any(padding)


def _moved(bias: Tensor | None, weight: Tensor, change: Tensor) -> nn.Parameter:
    """A new bias: the user's stays as it is."""
    old = torch.zeros_like(change) if bias is None else bias.detach().double()
    return parameter_like(weight, old + change)

"""AdaRound: the rounding of every layer is learned alone."""

from __future__ import annotations

from dataclasses import dataclass

from pennyweight.passes import passes
from pennyweight.passes.reconstruct import Reconstruct


@passes.register("adaround")
@dataclass(frozen=True)
class AdaRound(Reconstruct):
    """`Reconstruct` layer by layer, each with the activation behind it.

    Source: Nagel et al. 2020, "Up or Down? Adaptive Rounding for Post-Training Quantization" (arXiv:2004.10568).
    """

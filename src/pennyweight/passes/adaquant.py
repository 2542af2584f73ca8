"""AdaQuant: weights move to any level, and their scales are learned with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pennyweight.passes import passes
from pennyweight.passes.reconstruct import Reconstruct


@passes.register("adaquant")
@dataclass(frozen=True)
class AdaQuant(Reconstruct):
    """`Reconstruct` block by block with free weights: levels, scales of weights and activations, and biases are
    learned.

    Source: Hubara et al. 2021, "Accurate Post Training Quantization With Small Calibration Sets" (arXiv:2006.10518);
    the paper goes layer by layer, which is `units = "layer"`.
    """

    units: Literal["layer", "block", "network"] = "block"
    rounding: Literal["soft", "signs", "free"] = "free"
    steps: bool = True

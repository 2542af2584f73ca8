"""AdaQuant: weights move to any level, and their scales are learned with them."""

from __future__ import annotations

from dataclasses import dataclass

from pennyweight.passes import passes
from pennyweight.passes.reconstruct import Reconstruct, Units
from pennyweight.reconstruction.optimize import Rounding


@passes.register("adaquant")
@dataclass(frozen=True)
class AdaQuant(Reconstruct):
    """`Reconstruct` block by block with free weights: levels, scales of weights and activations, and biases are
    learned.

    Source: Hubara et al. 2021, "Accurate Post Training Quantization With Small Calibration Sets" (arXiv:2006.10518);
    the paper goes layer by layer, which is `units = "layer"`.
    """

    units: Units = "block"
    rounding: Rounding = "free"
    steps: bool = True

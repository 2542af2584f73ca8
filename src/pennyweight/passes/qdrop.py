"""QDrop: blocks are learned while half of the activations stay unrounded."""

from __future__ import annotations

from dataclasses import dataclass

from pennyweight.passes import passes
from pennyweight.passes.reconstruct import Reconstruct, Units


@passes.register("qdrop")
@dataclass(frozen=True)
class QDrop(Reconstruct):
    """`Reconstruct` block by block; in every step a random half of a block's inputs is that of the float network, and a
    random half of the values at every activation inside stays as it is. Scales of activations are learned too.

    Source: Wei et al. 2022, "QDrop: Randomly Dropping Quantization for Extremely Low-bit Post-Training Quantization"
    (arXiv:2203.05740).
    """

    units: Units = "block"
    drop: float = 0.5
    steps: bool = True

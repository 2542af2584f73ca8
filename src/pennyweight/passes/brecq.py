"""BRECQ: the roundings of a block are learned together, and errors that matter count more."""

from __future__ import annotations

from dataclasses import dataclass

from pennyweight.passes import passes
from pennyweight.passes.reconstruct import Reconstruct, Units


@passes.register("brecq")
@dataclass(frozen=True)
class Brecq(Reconstruct):
    """`Reconstruct` block by block, half of the squared errors weighted by the Fisher information of the block's result
    (`reconstruction.samples.fisher`); the scales of activations are learned in the same loop.

    Source: Li et al. 2021, "BRECQ: Pushing the Limit of Post-Training Quantization by Block Reconstruction"
    (arXiv:2102.05426).
    """

    units: Units = "block"
    fisher: bool = True
    steps: bool = True

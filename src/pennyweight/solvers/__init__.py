"""Solvers: from a weight matrix to codes. Pure functions of matrices, one file each, no knowledge of models."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from pennyweight.qtensor import QTensor
from pennyweight.ranges import RangeRule
from pennyweight.registry import Registry
from pennyweight.spec import QuantSpec


class Solver(Protocol):
    """`(weight [out, in], spec, range rule) -> QTensor`."""

    def __call__(self, weight: Tensor, spec: QuantSpec, rule: RangeRule) -> QTensor:
        """Find codes for `weight`."""
        ...


solvers: Registry[Solver] = Registry("solvers", "pennyweight.solvers")

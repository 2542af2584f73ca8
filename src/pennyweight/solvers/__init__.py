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


class InputSolver(Protocol):
    """`(weight [out, in], spec, range rule, gram) -> QTensor`: heeds which inputs the weight meets.

    gram: mean of `x x^T` over the inputs, [in, in]; or [groups, in, in], where the rows of `weight` are cut into so
    many equal parts, each with inputs of its own (grouped and depthwise convolutions). Further options by keyword.
    """

    def __call__(self, weight: Tensor, spec: QuantSpec, rule: RangeRule, gram: Tensor) -> QTensor:
        """Find codes for `weight`."""
        ...


solvers: Registry[Solver] = Registry("solvers", "pennyweight.solvers")
input_solvers: Registry[InputSolver] = Registry("solvers that read inputs", "pennyweight.solvers")

"""Methods: how the codes of one linear layer are found. One entry per method; formulas stand in `solvers`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pennyweight.formats import grids
from pennyweight.formats.integer import Integer
from pennyweight.qtensor import QTensor
from pennyweight.ranges import RangeRule
from pennyweight.ranges.minmax import MinMax
from pennyweight.ranges.mse import MSE
from pennyweight.registry import Registry
from pennyweight.solvers import input_solvers, solvers
from pennyweight.spec import QuantSpec


@dataclass(frozen=True)
class Problem:
    """A linear layer to be quantized.

    Attributes:
        weight: float32 [out, in].
        spec: of its codes.
        gram: mean of `x x^T` over the inputs it meets, float32 [in, in]; None where none were seen.
        cross: mean of `x~ x^T` with the inputs x~ of the float model, or None.
    """

    weight: Tensor
    spec: QuantSpec
    gram: Tensor | None = None
    cross: Tensor | None = None


@dataclass(frozen=True)
class Method:
    """An entry of `methods`.

    Attributes:
        solve: finds the codes.
        gram: whether it reads the second moments of the inputs.
        scales: whether inputs are first scaled as AWQ does.
        about: one line, for listings.
    """

    solve: Callable[[Problem], QTensor]
    gram: bool = False
    scales: bool = False
    about: str = ""


methods: Registry[Method] = Registry("methods")


def searched(spec: QuantSpec) -> RangeRule:
    """The range rule of least squared error; 2.4 as exponent for codes of 3 bits and fewer never won here."""
    grid = grids[spec.grid]
    few = isinstance(grid, Integer) and grid.bits <= 4
    return MSE(steps=60 if few else 20, shrink=0.3 if few else 0.8)


def _rtn(problem: Problem) -> QTensor:
    return solvers["rtn"](problem.weight, problem.spec, MinMax())


def _searched(problem: Problem) -> QTensor:
    return solvers["rtn"](problem.weight, problem.spec, searched(problem.spec))


def _gptq(problem: Problem) -> QTensor:
    if problem.gram is None:
        return _searched(problem)
    return input_solvers["gptq"](problem.weight, problem.spec, searched(problem.spec), problem.gram)


methods.add("rtn", Method(_rtn, about="round to nearest, ranges of the extremes"))
methods.add("searched", Method(_searched, about="round to nearest, ranges of least squared error"))
methods.add("gptq", Method(_gptq, gram=True, about="GPTQ, columns of much input first, groups fixed before"))


def relative_loss(weight: Tensor, q: QTensor, gram: Tensor | None) -> float:
    """`tr(D H D^T) / tr(W H W^T)`, `D = W - W'`: the output's energy that is lost; H = I without inputs."""
    error = weight - q.dequantize()
    if gram is None:
        return float((error**2).sum() / (weight**2).sum().clamp_min(1e-30))
    lost = torch.einsum("oi,oi->", error @ gram, error)
    return float(lost / torch.einsum("oi,oi->", weight @ gram, weight).clamp_min(1e-30))

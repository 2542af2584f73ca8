"""Methods: how the codes of one linear layer are found. One entry per method; formulas stand in `solvers`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pennyweight.formats import grids
from pennyweight.llm.superblock import Superblock, is_superblock
from pennyweight.qtensor import QTensor
from pennyweight.ranges import RangeRule
from pennyweight.ranges.minmax import MinMax
from pennyweight.ranges.mse import MSE
from pennyweight.registry import Registry
from pennyweight.solvers import input_solvers, solvers
from pennyweight.solvers.gptq import gptq
from pennyweight.solvers.retarget import retarget
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
        solve: finds the codes of one layer; of a method that trains, those where training starts.
        gram: whether it reads the second moments of the inputs.
        awq: whether inputs are first scaled as AWQ does.
        trains: whether the roundings of a block are then trained together.
        ruled: whether ranges stay as a rule found them, which superblocks need.
        about: one line, for listings.
    """

    solve: Callable[[Problem], QTensor]
    gram: bool = False
    awq: bool = False
    trains: bool = False
    ruled: bool = False
    about: str = ""


methods: Registry[Method] = Registry("methods")


def searched(spec: QuantSpec) -> RangeRule:
    """The range rule of least squared error; a coarser search for 8 bits, whose best range is near the extremes."""
    few = grids[spec.grid].bits <= 4
    return _storable(MSE(steps=60 if few else 20, shrink=0.3 if few else 0.8), spec)


def extremes(spec: QuantSpec) -> RangeRule:
    """The range rule of the extremes."""
    return _storable(MinMax(), spec)


def _storable(rule: RangeRule, spec: QuantSpec) -> RangeRule:
    return Superblock(rule) if is_superblock(spec) else rule


def _rtn(problem: Problem) -> QTensor:
    return solvers["rtn"](problem.weight, problem.spec, extremes(problem.spec))


def _searched(problem: Problem) -> QTensor:
    return solvers["rtn"](problem.weight, problem.spec, searched(problem.spec))


def _hqq(problem: Problem) -> QTensor:
    start = searched(problem.spec) if problem.spec.zero == "none" else MinMax()
    return solvers["hqq"](problem.weight, problem.spec, start)


def _by_inputs(solver: str, rule: Callable[[QuantSpec], RangeRule]) -> Callable[[Problem], QTensor]:
    def solve(problem: Problem) -> QTensor:
        if problem.gram is None:  # a layer that no token reached
            return _searched(problem)
        weight, gram = problem.weight, problem.gram
        if problem.cross is not None:
            weight = retarget(weight, gram, problem.cross)
        return input_solvers[solver](weight, problem.spec, rule(problem.spec), gram)

    return solve


def _gptq(problem: Problem) -> QTensor:
    """GPTQ; of 2 bits that of least `tr(D H D^T)` under searched ranges, those of the extremes, and those of the
    weights as they are when a group's turn comes.

    Ranges that clip, as the best of 2 bits do, clip what compensation adds to the weights too.
    """
    spec, gram = problem.spec, problem.gram
    if gram is None:  # a layer that no token reached
        return _searched(problem)
    weight = problem.weight if problem.cross is None else retarget(problem.weight, gram, problem.cross)
    best = gptq(weight, spec, searched(spec), gram)
    if grids[spec.grid].bits > 2 or is_superblock(spec):
        return best
    wide = gptq(weight, spec, extremes(spec), gram)
    late = gptq(weight, spec, searched(spec), gram, act_order="groups")  # type: ignore[call-arg]
    return min((best, wide, late), key=lambda q: relative_loss(weight, q, gram))


methods.add("rtn", Method(_rtn, ruled=True, about="round to nearest, ranges of the extremes"))
methods.add(
    "searched", Method(_searched, ruled=True, about="round to nearest, ranges of least squared error")
)
methods.add("hqq", Method(_hqq, about="half-quadratic: ranges that forgive outliers, without data"))
methods.add(
    "weighted",
    Method(
        _by_inputs("weighted", searched), gram=True, about="round to nearest, errors weighted by the inputs"
    ),
)
methods.add(
    "gptq",
    Method(
        _gptq,
        gram=True,
        ruled=True,
        about="GPTQ: columns of much input first, groups fixed before",
    ),
)
methods.add(
    "descent",
    Method(
        _by_inputs("descent", searched),
        gram=True,
        about="coordinate descent: codes and ranges in turn, from GPTQ's; a better fit in more time",
    ),
)
methods.add(
    "awq",
    Method(
        _by_inputs("clip", searched), gram=True, awq=True, about="AWQ: inputs scaled, then ranges clipped"
    ),
)
methods.add(
    "autoround",
    Method(
        _gptq,
        gram=True,
        trains=True,
        about="AutoRound: roundings and ranges of a block trained together, from GPTQ's codes",
    ),
)


def relative_loss(weight: Tensor, q: QTensor, gram: Tensor | None) -> float:
    """`tr(D H D^T) / tr(W H W^T)`, `D = W - W'`: the output's energy that is lost; H = I without inputs."""
    error = weight - q.dequantize()
    if gram is None:
        return float((error**2).sum() / (weight**2).sum().clamp_min(1e-30))
    lost = torch.einsum("oi,oi->", error @ gram, error)
    return float(lost / torch.einsum("oi,oi->", weight @ gram, weight).clamp_min(1e-30))

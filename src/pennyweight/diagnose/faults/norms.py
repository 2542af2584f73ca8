"""Batch norms whose statistics are not those that the model was quantized with."""

from __future__ import annotations

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from pennyweight.diagnose.faults.ranges import again
from pennyweight.diagnose.finding import Case, Finding, causes
from pennyweight.diagnose.simulate import Simulation
from pennyweight.tune.probe import compared

APART = 0.1  # of a row's scale
ALIKE = 0.98  # cosine of a row with its codes: the direction is the same


@causes.register("batch-norm mismatch")
def mismatch(case: Case) -> list[Finding]:
    """Rows of weights that point where float's do, at another length; norms that use the batch's statistics."""
    simulation, found = case.simulation, []
    folded = {e.site: str(e.data.get("norm", "")) for e in simulation.journal.of("fold")}
    for name, matrix in simulation.matrices.items():
        weight = simulation.weights.get(name)
        if weight is None or name not in folded:
            continue
        mine = weight.dequantize().reshape(matrix.shape).double()
        theirs = matrix.double()
        along = (mine * theirs).sum(1)
        lengths = (theirs**2).sum(1).clamp_min(1e-30)
        cosine = along / (lengths.sqrt() * (mine**2).sum(1).sqrt().clamp_min(1e-30))
        factor = along / lengths
        alive = cosine > ALIKE
        if int(alive.sum()) * 2 < len(matrix):
            continue
        off = (factor[alive].log().abs()).median()
        if float(off) > APART:
            found.append(
                Finding(
                    "batch-norm mismatch", folded[name],
                    f"{name} was folded with factors {float(torch.exp(off)):.2f} times away from those that the norm's "
                    "statistics give now",
                    "Quantize the float model again as it is now; after training, estimate its batch norms anew first.",
                    again, severity=10 * float(off), broad=True,
                )
            )  # fmt: skip
    training = [
        path for path, m in simulation.float_model.named_modules() if isinstance(m, _BatchNorm) and m.training
    ]
    if training:
        found.append(
            Finding(
                "batch-norm mismatch", training[0],
                f"{len(training)} batch norms of the float model use the statistics of the batch; the quantized model "
                "uses the running ones",
                "Call model.eval() before comparing; where running statistics are stale, estimate them anew.",
                _in_eval, severity=20.0, broad=True,
            )
        )  # fmt: skip
    return found


def _in_eval(simulation: Simulation) -> float:
    """Against the float model in eval mode."""
    modes = {m: m.training for m in simulation.float_model.modules()}
    try:
        wanted = simulation.outputs(simulation.float_model.eval())
    finally:
        for module, mode in modes.items():
            module.training = mode
    return compared(wanted, simulation.outputs(simulation.quantized)).sqnr_db

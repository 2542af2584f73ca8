"""Find the codes of every weight."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pennyweight.errors import PennyweightError
from pennyweight.nn import twins
from pennyweight.nn.calls import CallTwin, call_matrix
from pennyweight.passes import Context, Stage, passes
from pennyweight.plan import LayerPlan
from pennyweight.qtensor import QTensor
from pennyweight.ranges import ranges
from pennyweight.solvers import solvers


def weights(model: nn.Module, params: dict[str, Tensor]) -> list[tuple[Any, str, Tensor]]:
    """Every (twin, weight name, matrix [out, in]) of a prepared model that its plan quantizes."""
    found: list[tuple[Any, str, Tensor]] = []
    for module in model.modules():
        layer = getattr(module, "layer", None)
        if (
            not isinstance(layer, LayerPlan) or layer.weight is None
        ):  # users call their own modules `layer` too
            continue
        if isinstance(module, CallTwin):
            found.append((module, "weight", call_matrix(module, params[module.param])))
        elif layer.kind in twins and hasattr(module, "solved"):
            found += [(module, name, w) for name, w in twins[layer.kind].matrices(module).items()]
    return found


def sqnr(x: Tensor, y: Tensor) -> float:
    """Signal to quantization noise, `10 log10(sum x^2 / sum (x - y)^2)`, in dB; 200 at most."""
    noise = float(((x - y).double() ** 2).sum())
    signal = float((x.double() ** 2).sum())
    if noise == 0 or signal == 0:
        return 200.0
    return float(10 * torch.log10(torch.tensor(signal / noise)))


@passes.register("solve")
@dataclass(frozen=True)
class Solve:
    """One solver for every weight.

    Args:
        solver: name of a solver.
        range: name of the range rule it starts from.
        options: options of the range rule.
    """

    solver: str = "rtn"
    range: str = "minmax"
    options: dict[str, Any] = field(default_factory=dict)
    stage: ClassVar[Stage] = "solve"
    preserves_output: ClassVar[bool] = False

    def needs(self) -> set[str]:
        """Nothing."""
        return set()

    def run(self, context: Context) -> None:
        """Solve every weight; one `weight` event each, with the error in dB."""
        rule = ranges[self.range](**self.options)
        for twin, name, matrix in weights(context.model, dict(context.model.named_parameters())):
            site = f"{twin.layer.name}:{name}"
            try:
                q: QTensor = solvers[self.solver](matrix.float(), twin.layer.weight, rule)
            except PennyweightError as error:
                error.site = error.site or site
                raise type(error)(
                    error.what, site=error.site, spec=error.spec, shapes=error.shapes, hint=error.hint
                ) from error
            twin.solved[name] = q
            before = matrix.numel() * matrix.element_size()
            context.journal.add(
                "weight",
                site,
                spec=str(q.spec),
                sqnr_db=sqnr(matrix, q.dequantize()),
                before=before,
                after=q.nbytes,
            )

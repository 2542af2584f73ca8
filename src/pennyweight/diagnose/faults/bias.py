"""Biases that int32 has no room for at the scale of the products."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pennyweight.diagnose.finding import Case, Finding, causes
from pennyweight.diagnose.simulate import Matrix, Simulation, real_bias
from pennyweight.nn.integer import INT32_MAX, IntegerWeight

ROOM = INT32_MAX // 2  # a bias may take half of the accumulator


@causes.register("bias too large for its scale")
def too_large(case: Case) -> list[Finding]:
    """`|b| / (sx sw)` beyond half of int32: the engine adds such biases in float, other runtimes clamp them."""
    simulation, found = case.simulation, []
    for name, module in simulation.converted.items():
        if not isinstance(module, IntegerWeight) or module.mode != "static" or module.bias is None:
            continue
        bias = _wanted(simulation, name, module)
        unit = module.x_scale.double() * module.scale.double().reshape(-1)
        codes = (bias.double() / unit).abs()
        stored = None if module.bias.is_floating_point() else module.bias.double().abs()
        over = codes > ROOM
        if not bool(over.any()):
            continue
        worst = int(codes.argmax())
        clamped = stored is not None and bool((stored[over] >= INT32_MAX // 2 - 1).any())
        kept = (
            ""
            if stored is not None
            else "; the engine adds the biases of this layer in float, after the product"
        )
        found.append(
            Finding(
                "bias too large for its scale", f"{name}:bias",
                f"channel {worst} needs the code {float(codes[worst]):.3g}, int32 ends at {INT32_MAX:.3g}: its weights "
                f"reach {float(simulation.matrices[name][worst].abs().max()):.2g} only{kept}"
                if name in simulation.matrices else f"channel {worst} needs the code {float(codes[worst]):.3g}{kept}",
                "Give the channel a larger weight scale (its weights become zero), or keep the layer in float.",
                _with_room(name, bias), severity=2.0 if clamped else 0.5,
            )
        )  # fmt: skip
    return found


def _wanted(simulation: Simulation, name: str, module: IntegerWeight) -> Tensor:
    """The float bias, where the layer has one; a clamped code no longer tells."""
    own = getattr(simulation.twins.get(name), "bias", None)
    found = real_bias(module)
    assert found is not None
    if own is None:
        return found
    apart = (found - own.detach().float()).abs()
    return torch.where(apart > 0.5 * own.detach().abs() + 1e-12, own.detach().float(), found)


def _with_room(name: str, bias: Tensor) -> Callable[[Simulation], float]:
    def trial(simulation: Simulation) -> float:
        """The output where every bias has its value, and channels with too small a scale have a larger one."""
        weight = simulation.weights.get(name)
        module = simulation.converted[name]
        if not isinstance(weight, Matrix) or weight.codes is None or not isinstance(module, IntegerWeight):
            return simulation.damage().sqnr_db
        matrix = simulation.matrices[name]
        scale = weight.scale.reshape(-1, 1).expand(len(matrix), 1).double()
        needed = bias.abs().double().reshape(-1, 1) / (ROOM * module.x_scale.double())
        wider = torch.maximum(scale, needed).float()
        top = int(weight.codes.abs().max())
        codes = torch.where(wider > scale, torch.round(matrix / wider), weight.codes.float()).clamp(-top, top)
        own = getattr(simulation.twins[name], "bias", None)
        shift = bias if own is None else bias - own.detach().float()
        changed = Matrix(codes * wider, codes.to(torch.int8), wider.reshape(-1))
        with simulation.changed(weights={name: changed}, shifts={name: shift}):
            return simulation.damage().sqnr_db

    return trial

"""A model in simulated dynamic fixed point whose widths can be changed group by group."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pennyweight.formats import grids
from pennyweight.journal import Journal
from pennyweight.nn.fake import ActivationQuantizer
from pennyweight.passes.calibrate import Calibrate, quantizers
from pennyweight.passes.fold_batch_norm import FoldBatchNorm
from pennyweight.passes.solve import Solve, weights
from pennyweight.pipeline import calibrate, prepare
from pennyweight.plan import Rule
from pennyweight.qtensor import QParams, QTensor
from pennyweight.ranges import RangeRule, ranges
from pennyweight.recipe import Recipe
from pennyweight.solvers.rtn import rtn
from pennyweight.spec import QuantSpec

GROUPS = ("conv weights", "fc weights", "activations")
CONVOLUTIONS = (
    "Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d",
    "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
)  # fmt: skip

Widths = Mapping[str, int | None]
WIDEST = 8  # of what integer kernels take


# kind of parameters -> widths of weights that are tried, in this order
PARAMETERS = {"fixed_point": (16, 8, 4, 2), "power_of_two": (4, 3), "minifloat": (8, 6, 4)}
MINIFLOATS = {8: "fp8_e4m3", 6: "fp6_e2m3", 4: "fp4_e2m1"}


def weight_spec(parameters: str, bits: int) -> QuantSpec:
    """One scale per tensor: fixed point, powers of two, or floats of so many bits."""
    grids_of = {
        "fixed_point": f"int{bits}",
        "power_of_two": f"pot{bits}",
        "minifloat": MINIFLOATS.get(bits, ""),
    }
    return QuantSpec(grids_of[parameters])


def weight_rule(parameters: str) -> tuple[str, dict[str, Any]]:
    """Name and options of the range rule of weights: scales are powers of two.

    That of a minifloat is the bias of its exponents, which no weight exceeds.
    """
    if parameters == "minifloat":
        return "mx", {"rounding": "rceil"}
    return (
        ("fixed_point", {"headroom": 1})
        if parameters == "fixed_point"
        else ("power_of_two", {"rounding": "inq"})
    )


def fixed_point_recipe(parameters: str, conv: int, fc: int, activations: int, headroom: int = 0) -> Recipe:
    """Dynamic fixed point of these widths: all scales are powers of two, one per tensor.

    headroom: of activations, see `ranges.fixed_point`. Beside minifloats activations stay floats.
    """
    rule, options = weight_rule(parameters)
    inputs = None if parameters == "minifloat" else QuantSpec(f"int{activations}")
    return Recipe(
        f"{parameters} {conv}/{fc}/{activations}",
        (
            Rule(types=CONVOLUTIONS, weight=weight_spec(parameters, conv), input=inputs, optional=True),
            Rule(weight=weight_spec(parameters, fc), input=inputs, optional=True),
        ),
        (FoldBatchNorm(), Calibrate("fixed_point", {"headroom": headroom}), Solve("rtn", rule, options)),
    )


def widest(parameters: str) -> int:
    """The widest weights that kernels take."""
    return min(WIDEST, PARAMETERS[parameters][0])


def integer_length(scale: float, bits: int) -> int:
    """IL of a scale `2^-FL`, `FL = bits - IL`."""
    return bits + round(math.log2(scale))


class Simulated:
    """The twins of a model, calibrated once; `set` rounds to other widths.

    Biases are rounded to the accumulator's grid, `2^-(FL of the weight + FL of the input)`, where both are quantized:
    then all values are exact in float32 as long as no accumulator needs more than 24 bits, and are the integers'.

    Attributes:
        lengths: integer lengths of the activations that are one bit short of the greatest value.
        headroom: bits added to all of them.
    """

    def __init__(self, model: nn.Module, batches: list[Any], parameters: str, journal: Journal) -> None:
        self.parameters, self.headroom = parameters, 0
        start = widest(parameters)
        recipe = fixed_point_recipe(parameters, start, start, WIDEST)
        prepared = prepare(model, batches[0] if batches else None, recipe, journal=journal)
        self.model = calibrate(prepared, batches, progress=False)
        self.sites: dict[str, ActivationQuantizer] = quantizers(self.model)
        self.lengths = {site: integer_length(float(q.scale), 8) for site, q in self.sites.items()}
        found = weights(self.model, dict(self.model.named_parameters()))
        self.weights = [(twin, name, matrix.clone()) for twin, name, matrix in found]
        name, options = weight_rule(parameters)
        self.rule: RangeRule = ranges[name](**options)
        self.solved: dict[tuple[int, str, int], QTensor] = {}

    def group(self, twin: Any) -> str:
        """Of the weights of a layer."""
        return GROUPS[0] if twin.layer.kind in CONVOLUTIONS else GROUPS[1]

    def groups(self) -> list[str]:
        """Those that this model has."""
        here = {self.group(twin) for twin, _, _ in self.weights} | ({GROUPS[2]} if self.sites else set())
        return [g for g in GROUPS if g in here]

    def set(self, widths: Widths) -> nn.Module:
        """Round to these widths; None, or no entry, leaves a group in float."""
        bits = widths.get(GROUPS[2])
        for site, quantizer in self.sites.items():
            quantizer.active = bits is not None
            if bits is not None:
                quantizer.spec = QuantSpec(f"int{bits}")
                quantizer.set(QParams(torch.tensor(2.0 ** (self.lengths[site] + self.headroom - bits))))
        for twin, name, matrix in self.weights:
            wide = widths.get(self.group(twin))
            twin.solved.pop(name, None)
            if wide is not None:
                twin.solved[name] = self._rounded(twin, name, matrix, wide)
            if hasattr(twin, "bias_shift"):
                twin.bias_shift = None
                if wide is not None and bits is not None and twin.bias is not None and twin.input is not None:
                    q, bias = twin.solved[name], twin.bias.detach().double()
                    unit = getattr(
                        grids[q.spec.grid], "unit", 1.0
                    )  # of the integers that levels are multiples of
                    step = twin.input.scale.double() * q.scales().double().reshape(()) * unit
                    twin.bias_shift = (torch.round(bias / step) * step - bias).float()
        return self.model

    def _rounded(self, twin: Any, name: str, matrix: Tensor, bits: int) -> QTensor:
        key = (id(twin), name, bits)
        if key not in self.solved:
            self.solved[key] = rtn(matrix.float(), weight_spec(self.parameters, bits), self.rule)
        return self.solved[key]

    def table(self, widths: Widths) -> list[dict[str, Any]]:
        """Integer and fractional length of everything that is quantized: layer, group, bits, IL, FL."""
        rows: list[dict[str, Any]] = []
        bits = widths.get(GROUPS[2])
        for twin, name, matrix in self.weights:
            wide = widths.get(self.group(twin))
            if wide is None:
                continue
            scale = float(self._rounded(twin, name, matrix, wide).scales())
            row = {"site": f"{twin.layer.name}:{name}", "group": self.group(twin), "bits": wide}
            if self.parameters == "fixed_point":
                row |= {"IL": integer_length(scale, wide), "FL": -round(math.log2(scale))}
            else:  # exponents of the greatest and the least level
                levels = grids[weight_spec(self.parameters, wide).grid].levels() * scale
                least = float(levels[levels > 0].min())
                row |= {
                    "IL": math.floor(math.log2(float(levels.max()))),
                    "FL": -math.floor(math.log2(least)),
                }
            rows.append(row)
        for site, length in self.lengths.items():
            if bits is None:
                break
            length += self.headroom
            rows.append({"site": site, "group": GROUPS[2], "bits": bits, "IL": length, "FL": bits - length})
        return rows

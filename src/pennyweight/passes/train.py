"""Make a prepared model trainable, and settle it before it is converted."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pennyweight.errors import EmptyCalibration, RecipeError
from pennyweight.formats import grids
from pennyweight.formats.integer import Integer
from pennyweight.gradients import Estimator, Role, estimators
from pennyweight.nn.calls import CallTwin
from pennyweight.nn.fake import ActivationQuantizer, RunTimeQuantizer, WeightQuantizer
from pennyweight.nn.live_norm import live
from pennyweight.nn.rounding import ROUNDING, train_weight, trained
from pennyweight.passes import Context, Stage, passes, replace_module
from pennyweight.passes.fold_batch_norm import factor_and_shift
from pennyweight.passes.solve import weights
from pennyweight.qtensor import QParams, QTensor
from pennyweight.ranges import TINY
from pennyweight.spec import QuantSpec


@passes.register("train")
@dataclass(frozen=True)
class Train:
    """Quantization-aware training: every quantizer of the plan rounds with a gradient.

    Batch norm stays alive beside its convolution and is folded into the codes' scales at conversion:
    `W' = s q` and `bn(conv(x, W'))` gives `s_o' = s_o g_o / sqrt(v_o + eps)` on the same codes q, exactly.

    Args:
        weight: estimator of the weights, a name of `gradients.estimators`.
        input: estimator of the calibrated activations.
        weight_options: options of the one, such as `{delta = 0.01}` of "ewgs".
        input_options: options of the other.
        rate: of the moving average of ranges that are not learned.
    """

    weight: str = "lsq"
    input: str = "lsq"
    weight_options: dict[str, Any] = field(default_factory=dict)
    input_options: dict[str, Any] = field(default_factory=dict)
    rate: float = 0.01
    stage: ClassVar[Stage] = "train"
    preserves_output: ClassVar[bool] = False

    def needs(self) -> set[str]:
        """Nothing; also checks the names.

        Raises:
            RecipeError: if an estimator cannot serve, or does not know an option.
        """
        self.estimator("weight")
        self.estimator("input")
        return set()

    def estimator(self, role: Role) -> Estimator:
        """The estimator of weights or inputs, options filled in."""
        name = self.weight if role == "weight" else self.input
        found = estimators[name]
        if role not in found.serves:
            able = [n for n, e in estimators.items() if role in e.serves]
            raise RecipeError(f"estimator {name!r} cannot train a {role}", hint=f"One of {', '.join(able)}.")
        options = self.weight_options if role == "weight" else self.input_options
        try:
            made: Estimator = dataclasses.replace(found, **options)  # type: ignore[type-var]
        except TypeError as error:
            raise RecipeError(f"estimator {name!r}: {error}") from error
        return made

    def run(self, context: Context) -> None:
        """Attach the quantizers; one `train` event for the model."""
        found = weights(context.model, dict(context.model.named_parameters()))
        for twin, name, matrix in found:
            site = f"{twin.layer.name}:{name}"
            quantizer = WeightQuantizer(twin.layer.weight, site, matrix, self.estimator("weight"))
            train_weight(twin, name, quantizer)
        inputs: list[ActivationQuantizer] = [
            m for m in context.model.modules() if isinstance(m, ActivationQuantizer)
        ]
        for at_input in inputs:
            at_input.train_through(self.estimator("input"), self.rate)
        _share_tied(context)
        dynamic = _range_at_run_time(context.model)
        context.journal.add(
            "train",
            weight=self.weight,
            input=self.input,
            weights=len(found),
            inputs=len(inputs),
            dynamic=dynamic,
        )

    def initialise(self, context: Context) -> None:
        """Start from what calibration found: scales of the solved weights; the solved codes are dropped."""
        for twin, name, _ in weights(context.model, dict(context.model.named_parameters())):
            solved, quantizer = twin.solved.pop(name, None), trained(twin)[name]
            if solved is not None and getattr(quantizer.estimator, "calibrated", False):
                quantizer.set(QParams(solved.scales(), solved.zero))

    def finish(self, root: nn.Module, folds: Mapping[str, str]) -> None:
        """Write codes and ranges as trained, and fold the batch norms; `root` is changed.

        folds: path of a layer to that of the norm behind it.

        Raises:
            EmptyCalibration: if a site has no range yet.
        """
        for module in root.modules():
            if isinstance(module, ActivationQuantizer):
                if module.fresh:
                    raise EmptyCalibration(
                        "no value reached this site in training",
                        site=module.site,
                        hint="Train, or calibrate, with inputs that take this branch, or keep the layer in float.",
                    )
                module.settle()
        params: dict[str, Tensor] = dict(root.named_parameters())
        for twin, name, matrix in weights(root, params):
            twin.solved[name] = trained(twin)[name].codes(matrix)
        for twin in list(root.modules()):
            if ROUNDING in twin._modules:
                del twin._modules[ROUNDING]
            for table in (twin._modules, getattr(twin, "quantizers", None)):
                for key, child in list(table.items()) if table is not None else ():
                    if isinstance(child, RunTimeQuantizer):
                        _drop(twin, table, key)
        for path, norm in folds.items():
            _fold(root, path, norm)


def _drop(twin: nn.Module, table: Any, key: str) -> None:
    if isinstance(table, nn.ModuleDict):
        del table[key]
    else:
        twin._modules[key] = None


def live_norms(root: nn.Module, folds: Mapping[str, str]) -> None:
    """Swap the batch norms that will be folded for their live forms."""
    for path in folds.values():
        old = root.get_submodule(path)
        new = live(old)
        if new is not None:
            replace_module(root, old, new)


def _share_tied(context: Context) -> None:
    """Sites that must share a scale share a quantizer."""
    found = {m.site: m for m in context.model.modules() if isinstance(m, ActivationQuantizer)}
    for group in context.plan.ties:
        members = [found[str(site)] for site in group if str(site) in found]
        for other in members[1:]:
            replace_module(context.model, other, members[0])


def _range_at_run_time(model: nn.Module) -> int:
    """Quantizers for activations that are ranged at run time."""
    made = 0
    for twin in list(model.modules()):
        layer = getattr(twin, "layer", None)
        if not hasattr(twin, "solved") or layer is None or not layer.dynamic or 0 not in layer.inputs:
            continue
        spec: QuantSpec = layer.inputs[0]
        quantizer = RunTimeQuantizer(spec, str(layer.input_site(0)))
        if isinstance(twin, CallTwin):
            twin.quantizers["0"] = quantizer
        elif "input" in twin._modules or hasattr(twin, "input"):
            vars(twin).pop("input", None)
            twin.add_module("input", quantizer)
        else:
            continue
        made += 1
    return made


def _fold(root: nn.Module, path: str, norm_path: str) -> None:
    """Fold a norm into the codes' scales and the bias of the layer before it."""
    twin: Any = root.get_submodule(path)
    norm: Any = root.get_submodule(norm_path)
    if "weight" not in getattr(twin, "solved", {}):
        return  # a layer that stays in float keeps its norm beside it
    factor, shift = factor_and_shift(norm, twin.bias)
    twin.solved["weight"] = scaled(twin.solved["weight"], factor)
    twin.bias = nn.Parameter(shift.float(), requires_grad=False)
    replace_module(root, norm, nn.Identity())


def scaled(q: QTensor, factor: Tensor) -> QTensor:
    """`q` with every row times a factor, [rows] float64; negative ones turn the codes' signs, zero ones clear the row.

    Codes at the end that has no opposite (-128 of int8) move by one step where the sign turns; narrow grids have none.
    """
    rows = q.codes.shape[0]
    spec = q.spec if len(q.spec.block) else dataclasses.replace(q.spec, block=(1, None))
    column = factor.reshape(rows, 1)
    scale = (q.scales().double().expand(rows, -1) * column.abs()).float()
    turned, dead = column < 0, column == 0
    codes, zero = q.codes, q.zero
    if zero is None and not isinstance(grids[spec.grid], Integer):
        # a code is the place of its level: the opposite one counts from the other end; scale 0 is no scale
        codes = torch.where(turned, len(grids[spec.grid].levels()) - 1 - codes, codes).to(codes.dtype)
        scale = torch.where(dead, torch.full_like(scale, TINY), scale)
    elif zero is None:
        top = int(grids[spec.grid].levels()[-1])
        flipped = torch.clamp(-codes.to(torch.int16), max=top)
        codes = torch.where(turned, flipped.to(codes.dtype), codes)
        codes = torch.where(dead, torch.zeros_like(codes), codes)
        scale = torch.where(dead, torch.ones_like(scale), scale)
    else:
        zero = zero.expand(rows, -1)
        scale = torch.where(turned, -scale, scale)
    return QTensor(codes, scale, zero, spec)

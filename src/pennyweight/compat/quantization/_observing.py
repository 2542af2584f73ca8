"""Calibration as the old interfaces have it: every forward of a prepared model feeds statistics."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from pennyweight.nn.fake import ActivationQuantizer
from pennyweight.passes import Context, replace_module
from pennyweight.passes.calibrate import quantizers
from pennyweight.pipeline import state
from pennyweight.qtensor import QParams

FIXED = "_pw_fixed"  # attribute of a prepared model: scale and zero point by site, where they are known beforehand


class KeepFirstBatch:
    """A hook that takes the first batch for the model's example: what it was planned with was made up."""

    def __init__(self) -> None:
        self.done = False

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a forward."""
        if not self.done:
            bound = inspect.signature(module.forward).bind(*args, **kwargs)
            batch: Any = dict(bound.arguments) if bound.kwargs else bound.args
            state(module).example = tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, batch)
            self.done = True


def start(
    model: nn.Module, fixed: Mapping[str, tuple[float, float]] | None = None, *, keep: bool = False
) -> nn.Module:
    """Feed statistics from now on; a model that trains follows its ranges by itself. Returns the model.

    Args:
        model: from `pw.prepare`.
        fixed: scale and zero point of sites where they are known.
        keep: take the first batch for the example that the model is lowered with.
    """
    st = state(model)
    found = quantizers(model)
    vars(model)[FIXED] = dict(fixed or {})
    if st.recipe.trains:
        _fix(model)
    else:
        for quantizer in found.values():
            quantizer.observe(st.recipe.needs())
    if keep:
        model.register_forward_pre_hook(KeepFirstBatch(), with_kwargs=True)
    return model


def tie(
    model: nn.Module, groups: Iterable[Iterable[str]], fixed: Mapping[str, tuple[float, float]]
) -> dict[str, tuple[float, float]]:
    """Let further groups of sites share a scale; returns `fixed` with all that share a scale that is known.

    Args:
        model: from `pw.prepare`.
        groups: texts of sites; those that the plan does not have are passed over.
        fixed: scale and zero point by site.
    """
    st = state(model)
    known = {str(site): site for site in st.plan.sites()}
    ties = [set(group) for group in st.plan.ties]
    for group in groups:
        joined = {known[site] for site in group if site in known}
        apart = [other for other in ties if not other & joined]
        joined = joined.union(*(other for other in ties if other & joined))
        ties = [*apart, joined] if len(joined) > 1 else apart
    st.plan = dataclasses.replace(st.plan, ties=tuple(tuple(sorted(t)) for t in ties))
    if st.recipe.trains:
        found = quantizers(model)
        for members in st.plan.ties:
            held = [found[str(site)] for site in members if str(site) in found]
            for other in held[1:]:
                replace_module(model, other, held[0])
    spread = dict(fixed)
    for members in st.plan.ties:
        for params in [fixed[str(s)] for s in members if str(s) in fixed][:1]:
            spread |= {str(s): params for s in members}
    return spread


def finish(model: nn.Module) -> nn.Module:
    """Set every range and every code from what was seen, as `pw.calibrate` does after its sweep. Returns the model.

    Raises:
        EmptyCalibration: if a site that has to be calibrated saw no value.
    """
    st = state(model)
    for key in [k for k, hook in model._forward_pre_hooks.items() if isinstance(hook, KeepFirstBatch)]:
        del model._forward_pre_hooks[key]
        model._forward_pre_hooks_with_kwargs.pop(key, None)
    if st.recipe.trains or st.stage != "prepared":
        return model
    context = Context(model, st.graph, st.journal, st.plan)
    with torch.no_grad():
        st.recipe.run(context, "calibrate")
        _fix(model)
        st.recipe.run(context, "solve")
    for module in model.modules():
        if isinstance(module, ActivationQuantizer):
            module.statistics.clear()
            module.observing, module.active = False, True
    st.stage = "calibrated"
    return model


def _fix(model: nn.Module) -> None:
    """Put the ranges that are known beforehand in place of what was seen."""
    found = quantizers(model)
    for site, (scale, zero) in vars(model).get(FIXED, {}).items():
        if site in found:
            found[site].set(QParams(torch.tensor(scale), torch.tensor(zero)))
            found[site].following = False

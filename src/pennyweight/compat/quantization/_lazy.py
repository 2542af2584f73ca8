"""Preparation at the first forward: the old interfaces prepare a model before they have seen an input.

What `prepare` returns shares its parameters with what it becomes, so an optimizer made in between stays valid. State
dicts loaded in between are kept until there is something to put them into.
"""

from __future__ import annotations

import copy
import functools
import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pennyweight import pipeline
from pennyweight.compat.quantization import _observing
from pennyweight.errors import EmptyCalibration
from pennyweight.nn.fake import ActivationQuantizer, Quantizer
from pennyweight.passes import Context
from pennyweight.passes.calibrate import quantizers
from pennyweight.qtensor import QParams
from pennyweight.recipe import Recipe
from pennyweight.training import freeze_batch_norm

KEY = "_pw_waiting"


@dataclass
class Waiting:
    """What a model is going to be, and what was said meanwhile.

    Attributes:
        recipe: to prepare it with.
        notes: for its journal: site, text.
        rate: of its moving averages.
        switches: set by `enable_observer` and its like.
        converted: whether it is to be converted, too.
        states: state dicts with entries that are not there yet, of the prepared and of the converted model.
        called: arguments of the call that is being made, before any hook; None if `forward` itself was called.
    """

    recipe: Recipe
    notes: list[tuple[str, str]] = field(default_factory=list)
    rate: float = 0.01
    switches: dict[str, bool] = field(default_factory=dict)
    converted: bool = False
    states: dict[bool, dict[str, Tensor]] = field(default_factory=dict)
    called: tuple[tuple[Any, ...], dict[str, Any]] | None = None


def wait(model: nn.Module, waiting: Waiting) -> nn.Module:
    """Prepare `model` at its first forward; returns it."""
    vars(model)[KEY] = waiting
    vars(model)["forward"] = functools.partial(_first, model)
    model.register_forward_pre_hook(_called, prepend=True, with_kwargs=True)
    model.register_load_state_dict_pre_hook(_keep_state)
    model.register_state_dict_pre_hook(_no_state)
    return model


def _end(model: nn.Module) -> Waiting:
    """Take away what `wait` added."""
    waiting: Waiting = vars(model).pop(KEY)
    vars(model).pop("forward", None)
    for key, hook in list(model._forward_pre_hooks.items()):
        if hook is _called:
            model._forward_pre_hooks_with_kwargs.pop(key, None)
    for hooks in (model._forward_pre_hooks, model._load_state_dict_pre_hooks, model._state_dict_pre_hooks):
        for key, hook in list(hooks.items()):
            if getattr(hook, "hook", hook) in (_called, _keep_state, _no_state):
                del hooks[key]
    return waiting


def _called(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """With this hook every call of the module runs its hooks, those too that preparation adds."""
    vars(module)[KEY].called = (args, kwargs)


def _first(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    waiting: Waiting = vars(model)[KEY]
    called, waiting.called = waiting.called, None
    known = set(model._forward_pre_hooks)
    prepare_now(model, _example(model, *(called or (args, kwargs))))
    if called is None:
        return model(*args, **kwargs)
    for key, hook in list(model._forward_pre_hooks.items()):
        if key not in known:  # the caller has run the others, and will run those that come after
            hook(model, args)
    return model.forward(*args, **kwargs)


def _example(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Arguments as a batch."""
    if not kwargs:
        return tuple(args)
    names = list(inspect.signature(type(model).forward).parameters)[1:]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def prepare_now(model: nn.Module, example: Any) -> nn.Module:
    """Prepare a waiting model in place, on this example; if that fails, it waits on.

    Raises:
        EmptyCalibration: if it is to be converted, too, but there are no ranges.
    """
    waiting = _end(model)
    try:
        made = _prepared(model, example, waiting)
        if waiting.converted:
            made = _converted(made, waiting)
    except BaseException:
        wait(model, waiting)
        raise
    return pipeline.graft(model, made)


def _prepared(model: nn.Module, example: Any, waiting: Waiting) -> nn.Module:
    prepared = pipeline.prepare(model, example, waiting.recipe)
    for site, text in waiting.notes:
        pipeline.journal(prepared).add("note", site, text=text)
    _observing.start(prepared)
    for quantizer in quantizers(prepared).values():
        for statistic in quantizer.statistics.values():
            if hasattr(statistic, "rate"):
                statistic.rate = waiting.rate
    if False in waiting.states:
        prepared.load_state_dict(waiting.states[False])
    for name, on in waiting.switches.items():
        if name == "norms":
            freeze_batch_norm(prepared, on)
            continue
        for module in prepared.modules():
            if isinstance(module, Quantizer):
                switch(module, name, on)
    return prepared


def _converted(prepared: nn.Module, waiting: Waiting) -> nn.Module:
    """Integer layers with the ranges and codes of the state dicts that were loaded."""
    if not waiting.states:
        raise EmptyCalibration(
            "the model was converted without having seen an input", site=type(prepared).__name__,
            hint="Train or calibrate it before it is converted, or load the state dict of a converted one.",
        )  # fmt: skip
    if True not in waiting.states:
        return pipeline.convert(_observing.finish(prepared))
    st = pipeline.state(prepared)
    for quantizer in quantizers(prepared).values():  # until the state dict brings the real ones
        quantizer.set(QParams(torch.ones(()), None if quantizer.spec.zero == "none" else torch.zeros(())))
        quantizer.observing = False
    if not st.recipe.trains:
        st.recipe.run(Context(prepared, st.graph, st.journal, st.plan), "solve")
        st.stage = "calibrated"
    made = pipeline.convert(prepared)
    made.load_state_dict(waiting.states[True])
    return made


def convert_later(model: nn.Module, inplace: bool) -> nn.Module:
    """A waiting model that is converted, too, at its first forward: for a state dict to be loaded into."""
    root = model if inplace else copy.deepcopy(model)
    vars(root)[KEY].converted = True
    return root.eval()


def waits(model: nn.Module) -> bool:
    """Whether the model has seen no input yet."""
    return KEY in vars(model)


def _keep_state(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Keep a state dict that has ranges or codes; what the float model has of it is loaded at once."""
    waiting = vars(module).pop(KEY)
    own = module.state_dict()
    vars(module)[KEY] = waiting
    given = {key[len(prefix) :]: value for key, value in state_dict.items() if key.startswith(prefix)}
    if not given.keys() - own.keys():
        return
    waiting.states[waiting.converted] = {
        k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in given.items()
    }
    for key in given.keys() - own.keys():
        del state_dict[prefix + key]
    for key in own.keys() - given.keys():
        state_dict[prefix + key] = own[key]


def _no_state(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    """A model that is to be converted has no state yet.

    Raises:
        EmptyCalibration: in that case.
    """
    if waits(module) and vars(module)[KEY].converted:
        raise EmptyCalibration(
            "the model was converted before it has seen an input, so it has no state yet",
            site=type(module).__name__,
            hint="Train or calibrate before converting; after load_state_dict run one forward first.",
        )


def switch(quantizer: Quantizer, name: str, on: bool) -> None:
    """Rounding or observing, on or off."""
    if name == "rounding":
        quantizer.active = on
        return
    quantizer.following = on
    if isinstance(quantizer, ActivationQuantizer) and quantizer.statistics:
        quantizer.observing = on


def remember(module: nn.Module, name: str, on: bool) -> None:
    """Keep a switch for a model that is not prepared yet; other modules have none."""
    if waits(module):
        vars(module)[KEY].switches[name] = on

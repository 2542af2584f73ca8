"""From `QConfig`s to the rules and passes of a recipe."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pennyweight.compat.quantization import _specs
from pennyweight.compat.quantization.qconfig_mapping import QConfigMapping
from pennyweight.errors import UnrealisableSite
from pennyweight.graph import ops
from pennyweight.graph.record import op_name
from pennyweight.passes import Pass
from pennyweight.passes.calibrate import Calibrate
from pennyweight.passes.fold_batch_norm import FoldBatchNorm
from pennyweight.passes.solve import Solve
from pennyweight.passes.train import Train
from pennyweight.plan import LEAVES, RECURRENT, WEIGHT_ONLY, Rule
from pennyweight.recipe import Recipe
from pennyweight.spec import QuantSpec


@dataclass
class Read:
    """What a `QConfig` says."""

    weight: QuantSpec | None
    input: QuantSpec | None
    dynamic: bool
    half: bool
    table: bool
    input_range: str
    weight_range: str
    rate: float
    fixed: bool


_KNOWN = ("pennyweight", "torch", "torchao")  # packages whose observers are known by name


class _Fields:
    """An observer or fake-quantizer by the fields that specs are read by."""

    def __init__(self, constructor: Any) -> None:
        made = constructor()
        described = getattr(made, "activation_post_process", made)
        self.dtype = getattr(described, "dtype", torch.float32)  # nn.Identity stands for "nothing"
        for name in ("qscheme", "quant_min", "quant_max", "ch_axis"):
            setattr(self, name, getattr(described, name, None))
        self.is_dynamic = bool(getattr(described, "is_dynamic", False))
        self.averaging_constant = getattr(described, "averaging_constant", None)
        self.observer_or_fake_quant_ctr = _standard(described)
        if made is not described:
            _standard(made)


def _standard(described: Any) -> type[Any]:
    """The class that stands behind an observer or fake-quantizer, whose name says what it does.

    Raises:
        UnrealisableSite: if a class of the user's own changes what it does.
    """
    classes = type(described).__mro__
    known = next(c for c in classes if c.__module__.partition(".")[0] in _KNOWN)
    for kind in classes[: classes.index(known)]:
        changed = sorted({"forward", "calculate_qparams", "_calculate_qparams"} & vars(kind).keys())
        if changed:
            raise UnrealisableSite(
                f"{kind.__name__}.{changed[0]} would not be called: ranges are found by rules",
                spec=kind.__name__,
                hint="Register the rule with pennyweight.ranges.ranges.register('mine') and name it in a recipe: "
                "Calibrate(range='mine').",
            )
    return known


def read(qconfig: Any, site: str) -> Read:
    """What a `QConfig` asks for.

    Raises:
        UnrealisableSite: if there is no such grid.
    """
    act, weight = _Fields(qconfig.activation), _Fields(qconfig.weight)
    half = _specs.is_half(weight)
    signal = None if half else _specs.activation_spec(act, site)
    axis = getattr(weight, "ch_axis", None) or 0
    found = None if half else _specs.weight_spec(weight, site, axis)
    table = getattr(weight, "qscheme", None) == torch.per_channel_affine_float_qparams
    return Read(
        found, None if signal is None else signal[0], bool(signal and signal[1]), half, table,
        _specs.range_of(act), _specs.range_of(weight), act.averaging_constant or 0.01,
        "FixedQParams" in act.observer_or_fake_quant_ctr.__name__,
    )  # fmt: skip


def rules_of(qconfig: Any, match: str, types: tuple[str, ...] = ()) -> tuple[list[Rule], Read | None]:
    """Rules for what `match` and `types` name; tables and recurrent layers need configurations of their own."""
    if qconfig is None:
        return [Rule(match, types, keep="float32", optional=True)], None
    said = read(qconfig, match)
    shared: dict[str, Any] = {"optional": True}
    if said.fixed and (not types or LEAVES & set(types)):
        raise UnrealisableSite(
            "a QConfig with a known scale speaks of a layer's result; here sites are a layer's inputs",
            site=match,
            hint="Say it by prepare_pt2e and a FixedQParamsQuantizationSpec, or let the range be observed.",
        )
    if said.half:
        return [Rule(match, types or ("Linear",), keep="float16", **shared)], said
    rules: list[Rule] = []
    if said.table:
        return [Rule(match, types or tuple(sorted(WEIGHT_ONLY)), weight=said.weight, **shared)], said
    held = set(types)
    if not types or held & WEIGHT_ONLY:
        rules.append(Rule(match, tuple(sorted(WEIGHT_ONLY)), keep="float32", **shared))
    if not types or held & RECURRENT:
        kinds = tuple(sorted(held & RECURRENT or RECURRENT))
        if said.dynamic:
            rows, stored = QuantSpec("uint8", (1, None), "int"), QuantSpec("int8n", (1, None), "none", "bf16")
            rules.append(Rule(match, kinds, weight=stored, input=rows, dynamic=True, **shared))
        else:
            rules.append(Rule(match, kinds, keep="float32", **shared))
    others = tuple(sorted(held - WEIGHT_ONLY - RECURRENT))
    if others or not types:
        if said.weight is None:
            rules.append(Rule(match, others, keep="float32", **shared))
        else:
            rules.append(
                Rule(match, others, weight=said.weight, input=said.input, dynamic=said.dynamic, **shared)
            )
    return rules, said


def type_name(kind: Callable[..., Any] | str) -> str:
    """A class, a function or the name of a method as a rule names it."""
    if isinstance(kind, str):
        return kind.rstrip("_")
    if _is_module(kind):
        return kind.__name__
    return op_name(kind)


def inside(path: str) -> tuple[str, ...]:
    """Matches of the module at a path and all that is inside of it."""
    return ("*",) if not path else (path, f"{path}.*", f"{path}:*")


def _depth(path: str) -> int:
    """How far down a module is; the root is above all."""
    return path.count(".") + bool(path)


def _is_module(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, nn.Module)


def mapping_rules(mapping: QConfigMapping, model: nn.Module) -> tuple[list[Rule], list[Read]]:
    """Ordered rules of a mapping: what wins comes first."""
    rules: list[Rule] = []
    said: list[Read] = []

    def add(qconfig: Any, match: str, types: tuple[str, ...] = ()) -> None:
        found, one = rules_of(qconfig, match, types)
        rules.extend(found)
        said.extend([one] if one is not None else [])

    modules = dict(model.named_modules())
    for (name, kind, index), qconfig in mapping.module_name_object_type_order_qconfigs.items():
        if not _is_module(kind):
            add(qconfig, f"{name}:{type_name(kind)}/{index}", (type_name(kind),))
        elif name in modules:
            of_kind = [n for n, child in modules[name].named_children() if type(child) is kind]
            for child in of_kind[index : index + 1]:
                add(qconfig, f"{name}.{child}".lstrip("."))
    for name in sorted(mapping.module_name_qconfigs, key=_depth, reverse=True):
        for match in inside(name):
            add(mapping.module_name_qconfigs[name], match)
    for pattern, qconfig in mapping.module_name_regex_qconfigs.items():
        for path in modules:
            if re.match(pattern, path):
                add(qconfig, path)
                add(qconfig, f"{path}:*")
    for kind, qconfig in mapping.object_type_qconfigs.items():
        add(qconfig, "*", (type_name(kind),))
    for path in sorted(modules, key=_depth, reverse=True):  # layers inside of a class that is no layer itself
        kind = type(modules[path])
        if path and kind in mapping.object_type_qconfigs and type_name(kind) not in LEAVES:
            for match in inside(path):
                add(mapping.object_type_qconfigs[kind], match)
    add(mapping.global_qconfig, "*")
    return rules, said


def attribute_rules(model: nn.Module) -> tuple[list[Rule], list[Read]]:
    """Ordered rules of `qconfig` attributes: a module's own, or that of the nearest module around it."""
    rules: list[Rule] = []
    said: list[Read] = []
    owners = [(path, vars(m)["qconfig"]) for path, m in model.named_modules() if "qconfig" in vars(m)]
    for path, qconfig in sorted(owners, key=lambda pair: -_depth(pair[0])):
        for match in inside(path):
            found, one = rules_of(qconfig, match)
            rules.extend(found)
            said.extend([one] if one is not None else [])
    if not any(path == "" for path, _ in owners):
        rules.append(Rule(keep="float32", optional=True))
    return rules, said


def recipe_of(name: str, rules: Iterable[Rule], said: list[Read], *, train: bool) -> Recipe:
    """The recipe: rules, and the passes that the observers stand for."""
    inputs = Counter(one.input_range for one in said if one.input is not None and not one.dynamic)
    weights = Counter(one.weight_range for one in said if one.weight is not None)
    passes: tuple[Pass, ...] = (FoldBatchNorm(),)
    if train:
        passes += (Train(weight="clipped", input="clipped", rate=rate_of(said)),)
    else:
        common = inputs.most_common(1)
        passes += (Calibrate(range=common[0][0] if common else "minmax"),) if common else ()
        passes += (Solve(range=_weight_range(weights)),)
    unique = list(dict.fromkeys(rules))
    return Recipe(name, tuple(unique), passes)


def rate_of(said: list[Read]) -> float:
    """The rate of moving averages that most of the observers ask for."""
    rates = Counter(one.rate for one in said if one.input is not None and not one.dynamic)
    return rates.most_common(1)[0][0] if rates else 0.01


def _weight_range(asked: Counter[str]) -> str:
    found = asked.most_common(1)[0][0] if asked else "minmax"
    return "minmax" if found == "moving_minmax" else found  # a weight stands still


def keep_types(rules: list[Rule], allowed: set[str]) -> list[Rule]:
    """The rules with everything in float whose type is not allowed."""
    known = sorted(
        (ops.CONVS | {"Linear", "linear", "MultiheadAttention"} | WEIGHT_ONLY | RECURRENT) - allowed
    )
    return [Rule(types=tuple(known), keep="float32", optional=True), *rules] if known else rules

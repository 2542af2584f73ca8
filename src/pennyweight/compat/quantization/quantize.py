"""The eager face: prepare, train or calibrate, convert."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pennyweight import pipeline
from pennyweight.compat.quantization import _lazy, _observing, _rules
from pennyweight.compat.quantization.qconfig import default_dynamic_qconfig, float16_dynamic_qconfig
from pennyweight.compat.quantization.qconfig import float_qparams_weight_only_qconfig as _table_qconfig
from pennyweight.compat.quantization.stubs import QuantStub, QuantWrapper
from pennyweight.errors import InputError, PennyweightError
from pennyweight.nn.fake import Quantizer
from pennyweight.nn.live_norm import LiveNorm
from pennyweight.passes.solve import Solve
from pennyweight.plan import Rule
from pennyweight.recipe import Recipe

_DYNAMIC: tuple[type[nn.Module], ...] = (nn.Linear, nn.LSTM, nn.GRU, nn.LSTMCell, nn.GRUCell)
_REDUCED = "reduce_range is not needed: no kernel saturates an intermediate"


def prepare(
    model: nn.Module, inplace: bool = False, allow_list: Any = None, observer_non_leaf_module_list: Any = None,
    prepare_custom_config_dict: Any = None,
) -> nn.Module:  # fmt: skip
    """A model whose forwards feed the statistics of its `qconfig`s, until `convert`.

    It is prepared at its first forward, which shows what flows where.

    Args:
        model: with `qconfig` attributes; a module without one takes that of the module around it, None keeps float.
        inplace: change the model rather than a copy.
        allow_list: read for the signature's sake, as the next two.
        observer_non_leaf_module_list: likewise.
        prepare_custom_config_dict: likewise.

    Raises:
        InputError: if no module has a `qconfig`.
    """
    return _prepare(model, inplace, train=False)


def prepare_qat(model: nn.Module, mapping: Any = None, inplace: bool = False) -> nn.Module:
    """A model that trains with rounding; its parameters are those that an optimizer made now will find.

    Args:
        model: in train mode, with `qconfig` attributes.
        mapping: read for the signature's sake: twins are found by type.
        inplace: change the model rather than a copy.

    Raises:
        InputError: if no module has a `qconfig`, or the model is in eval mode.
    """
    if not model.training:
        raise InputError("prepare_qat takes a model in train mode", hint="model.train() first.")
    return _prepare(model, inplace, train=True)


def _prepare(model: nn.Module, inplace: bool, *, train: bool) -> nn.Module:
    if not any("qconfig" in vars(m) and m.qconfig is not None for m in model.modules()):
        raise InputError(
            "no module has a qconfig", site=type(model).__name__,
            hint="model.qconfig = get_default_qconfig('x86') first.",
        )  # fmt: skip
    root = model if inplace else copy.deepcopy(model)
    rules, said = _rules.attribute_rules(root)
    recipe = _rules.recipe_of("eager-qat" if train else "eager", rules, said, train=train)
    notes = [("", _REDUCED)]
    if not any(isinstance(m, QuantStub) for m in root.modules()):
        notes.append(("", "the model has no QuantStub; layers are quantized by their qconfig alone"))
    return _lazy.wait(root, _lazy.Waiting(recipe, notes, _rules.rate_of(said)))


def convert(
    module: nn.Module, mapping: Any = None, inplace: bool = False, remove_qconfig: bool = True,
    is_reference: bool = False, convert_custom_config_dict: Any = None,
) -> nn.Module:  # fmt: skip
    """Integer layers from what was observed or trained. The state dict holds plain tensors.

    A model that has seen no input is converted at its first forward, with the state dict that was loaded until then.

    Args:
        module: from `prepare` or `prepare_qat`.
        mapping: read for the signature's sake.
        inplace: change the module rather than make another.
        remove_qconfig: whether the result still has `qconfig` attributes.
        is_reference: read for the signature's sake: there is one integer meaning.
        convert_custom_config_dict: likewise.

    Raises:
        EmptyCalibration: if a site saw no value; at the first forward, if there was neither an input nor a state dict.
        PennyweightError: if it was not prepared.
    """
    if _lazy.waits(module):
        return _lazy.convert_later(module, inplace)
    made = pipeline.convert(_observing.finish(module))
    if remove_qconfig:
        for child in made.modules():
            vars(child).pop("qconfig", None)
    return pipeline.graft(module, made) if inplace else made


def quantize(model: nn.Module, run_fn: Callable[..., Any], run_args: Any, mapping: Any = None,
             inplace: bool = False) -> nn.Module:  # fmt: skip
    """`prepare`, `run_fn(model, *run_args)`, `convert`."""
    root = prepare(model.eval() if inplace else copy.deepcopy(model).eval(), inplace=True)
    run_fn(root, *run_args)
    return convert(root, mapping, inplace=True)


def quantize_qat(
    model: nn.Module, run_fn: Callable[..., Any], run_args: Any, inplace: bool = False
) -> nn.Module:
    """`prepare_qat`, `run_fn(model, *run_args)`, `convert`."""
    root = prepare_qat(model.train() if inplace else copy.deepcopy(model).train(), inplace=True)
    run_fn(root, *run_args)
    return convert(root.eval(), inplace=True)


def quantize_dynamic(
    model: nn.Module, qconfig_spec: Any = None, dtype: torch.dtype = torch.qint8, mapping: Any = None,
    inplace: bool = False,
) -> nn.Module:  # fmt: skip
    """Activations ranged at run time; no data are needed.

    Args:
        model: in eval mode.
        qconfig_spec: a set of classes or paths, or a dictionary from them to `QConfig`s; linear and recurrent layers by
            default.
        dtype: torch.qint8, torch.float16 (weights of linear layers), torch.quint8 (tables).
        mapping: read for the signature's sake.
        inplace: change the model rather than make another.

    Raises:
        InputError: on another dtype.
        NothingQuantized: if the model has no such layer.
    """
    defaults = {torch.qint8: default_dynamic_qconfig, torch.float16: float16_dynamic_qconfig,
                torch.quint8: _table_qconfig}  # fmt: skip
    if dtype not in defaults:
        raise InputError(
            f"dtype {dtype} has no dynamic form", hint="torch.qint8, torch.float16 or torch.quint8."
        )
    tables = dtype == torch.quint8
    wanted: Iterable[Any] = qconfig_spec if qconfig_spec is not None else (
        (nn.EmbeddingBag, nn.Embedding) if tables else (nn.Linear,) if dtype == torch.float16 else _DYNAMIC
    )  # fmt: skip
    rules: list[Rule] = []
    for key in wanted:
        qconfig = wanted[key] if isinstance(wanted, Mapping) else defaults[dtype]
        for match in inside(key):
            rules += _rules.rules_of(
                qconfig, match, () if isinstance(key, str) else (_rules.type_name(key),)
            )[0]
    rules.append(Rule(keep="float32", optional=True))
    recipe = Recipe("eager-dynamic", tuple(rules), (Solve(range="minmax"),))
    prepared = pipeline.prepare(model.eval() if inplace else copy.deepcopy(model).eval(), None, recipe)
    made = pipeline.convert(pipeline.calibrate(prepared, (), progress=False))
    return pipeline.graft(model, made) if inplace else made


def inside(key: Any) -> tuple[str, ...]:
    """Matches of a class or of a path."""
    return _rules.inside(key) if isinstance(key, str) else ("*",)


def propagate_qconfig_(
    module: nn.Module, qconfig_dict: Any = None, prepare_custom_config_dict: Any = None
) -> None:
    """Give every module the `qconfig` of the one around it, or what a dictionary says by path or class."""
    given = qconfig_dict or {}

    def visit(child: nn.Module, path: str, around: Any) -> None:
        own = given.get(path, given.get(type(child), vars(child).get("qconfig", around)))
        vars(child)["qconfig"] = own
        for name, grandchild in child.named_children():
            visit(grandchild, f"{path}.{name}".lstrip("."), own)

    visit(module, "", given.get(""))


def add_quant_dequant(module: nn.Module) -> nn.Module:
    """Wrap the leaves that have a `qconfig` between stubs; in place, returns the module or its wrapper."""
    if not list(module.children()) and getattr(module, "qconfig", None) is not None:
        return QuantWrapper(module)
    for name, child in list(module.named_children()):
        module._modules[name] = add_quant_dequant(child)
    return module


def freeze_bn_stats(mod: nn.Module) -> None:
    """For `model.apply`: norms use their running statistics in train mode from now on."""
    if isinstance(mod, LiveNorm):
        mod.frozen = True
    _lazy.remember(mod, "norms", True)


def update_bn_stats(mod: nn.Module) -> None:
    """For `model.apply`: norms follow the batches again."""
    if isinstance(mod, LiveNorm):
        mod.frozen = False
    _lazy.remember(mod, "norms", False)


def get_observer_state_dict(mod: nn.Module) -> dict[str, Tensor]:
    """The entries of the state dict that belong to ranges."""
    paths = tuple(f"{p}." for p, m in mod.named_modules(remove_duplicate=False) if isinstance(m, Quantizer))
    return {key: value for key, value in mod.state_dict().items() if key.startswith(paths)} if paths else {}


def load_observer_state_dict(mod: nn.Module, obs_dict: Mapping[str, Tensor]) -> None:
    """Put ranges back.

    Raises:
        PennyweightError: if the model has no such ranges.
    """
    _, unexpected = mod.load_state_dict(dict(obs_dict), strict=False)
    if unexpected:
        raise PennyweightError(
            f"the model has no range {unexpected[0]!r}", hint="Prepare it, and run one batch, before loading."
        )

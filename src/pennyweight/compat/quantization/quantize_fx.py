"""The FX face. Nothing is traced symbolically: the model is followed as it runs, and keeps its class."""

from __future__ import annotations

import copy
from typing import Any

from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from pennyweight import pipeline
from pennyweight.compat.quantization import _lazy, _observing, _rules
from pennyweight.compat.quantization.backend_config import BackendConfig
from pennyweight.compat.quantization.fx.custom_config import PrepareCustomConfig
from pennyweight.compat.quantization.qconfig_mapping import QConfigMapping
from pennyweight.errors import InputError, PennyweightError
from pennyweight.passes import clone, replace_module
from pennyweight.passes.fold_batch_norm import fold_pair
from pennyweight.plan import Rule

Mapping = QConfigMapping | dict[str, Any]


def prepare_fx(
    model: nn.Module, qconfig_mapping: Mapping, example_inputs: Any = None, prepare_custom_config: Any = None,
    _equalization_config: Any = None, backend_config: Any = None,
) -> nn.Module:  # fmt: skip
    """A model whose forwards feed the statistics of its `QConfig`s, until `convert_fx`.

    Args:
        model: in eval mode.
        qconfig_mapping: a `QConfigMapping`, or an old dictionary.
        example_inputs: positional arguments; without them the first forward shows what flows where.
        prepare_custom_config: a `PrepareCustomConfig` or its dictionary.
        backend_config: a `BackendConfig` or its dictionary; operations that it does not name stay in float.

    Raises:
        InputError: on a mapping that is none.
        PennyweightError: on equalization, and on options that cannot be honoured.
    """
    if _equalization_config:
        raise PennyweightError(
            "equalization is no option of prepare here", hint="It is planned as a pass of recipes."
        )
    return _prepare(
        model, qconfig_mapping, example_inputs, prepare_custom_config, backend_config, train=False
    )


def prepare_qat_fx(
    model: nn.Module, qconfig_mapping: Mapping, example_inputs: Any = None, prepare_custom_config: Any = None,
    backend_config: Any = None,
) -> nn.Module:  # fmt: skip
    """A model that trains with rounding and shares its parameters with `model`.

    Args:
        model: in train mode.
        qconfig_mapping: see `prepare_fx`, as the others.
        example_inputs: may be left out, as in old code.
        prepare_custom_config: a `PrepareCustomConfig` or its dictionary.
        backend_config: a `BackendConfig` or its dictionary.

    Raises:
        InputError, PennyweightError: see `prepare_fx`.
    """
    return _prepare(model, qconfig_mapping, example_inputs, prepare_custom_config, backend_config, train=True)


def _prepare(
    model: nn.Module, given: Any, example: Any, custom: Any, backend: Any, *, train: bool
) -> nn.Module:
    if isinstance(given, dict):
        given = QConfigMapping.from_dict(given)
    if not isinstance(given, QConfigMapping):
        raise InputError(
            f"a {type(given).__name__} is no QConfigMapping",
            hint="get_default_qconfig_mapping('x86'), or a dictionary {'': qconfig}.",
        )
    if isinstance(custom, dict):
        custom = PrepareCustomConfig.from_dict(custom)
    if isinstance(backend, dict):
        backend = BackendConfig.from_dict(backend)
    root = clone(model)
    if not train:
        root.eval()
    rules, said = _rules.mapping_rules(given, root)
    if backend is not None and backend.configs:
        rules = _rules.keep_types(rules, {_rules.type_name(kind) for kind in backend.types()})
    for path in custom.kept(root) if custom is not None else ():
        rules = [*(Rule(match, keep="float32", optional=True) for match in _rules.inside(path)), *rules]
    recipe = _rules.recipe_of("fx-qat" if train else "fx", rules, said, train=train)
    _lazy.wait(root, _lazy.Waiting(recipe, rate=_rules.rate_of(said)))
    if example is None:
        return root
    return _lazy.prepare_now(root, tuple(example) if isinstance(example, tuple | list) else (example,))


def convert_fx(
    graph_module: nn.Module, convert_custom_config: Any = None, _remove_qconfig: bool = True,
    qconfig_mapping: Any = None, backend_config: Any = None, keep_original_weights: bool = False,
) -> nn.Module:  # fmt: skip
    """Integer layers from what was observed or trained; the model given stays as it is.

    A model that has seen no input is converted at its first forward, with the state dict that was loaded until then.

    Args:
        graph_module: from `prepare_fx` or `prepare_qat_fx`.
        convert_custom_config: read for the signature's sake: attributes are kept.
        qconfig_mapping: likewise: what is converted was said when the model was prepared.
        backend_config: likewise.
        keep_original_weights: true is refused: an integer layer has codes alone.

    Raises:
        EmptyCalibration: if a site saw no value; at the first forward, if there was neither an input nor a state dict.
        PennyweightError: if it was not prepared.
    """
    if keep_original_weights:
        raise PennyweightError(
            "a converted model has no float weights", hint="Keep the float model beside it."
        )
    if _lazy.waits(graph_module):
        return _lazy.convert_later(graph_module, inplace=False)
    return pipeline.convert(_observing.finish(graph_module))


def fuse_fx(model: nn.Module, fuse_custom_config: Any = None, backend_config: Any = None) -> nn.Module:
    """Fold every norm that follows a convolution or linear layer alone; a copy of the model, in eval mode.

    Args:
        model: in eval mode, and one that `torch.fx` can trace.
        fuse_custom_config: read for the signature's sake.
        backend_config: likewise.

    Raises:
        InputError: on a model in train mode.
    """
    if model.training:
        raise InputError("a model in train mode cannot be folded", hint="model.eval() first.")
    root = copy.deepcopy(model)
    names = dict(root.named_modules())
    for node in fx.symbolic_trace(root).graph.nodes:
        norm = names.get(str(node.target)) if node.op == "call_module" else None
        source = node.args[0] if isinstance(norm, _BatchNorm) else None
        if not isinstance(source, fx.Node) or source.op != "call_module" or len(source.users) > 1:
            continue
        layer = names[str(source.target)]
        if norm is not None and isinstance(layer, _ConvNd | nn.Linear):
            replace_module(root, layer, fold_pair(layer, norm))
            replace_module(root, norm, nn.Identity())
    return root


def convert_to_reference_fx(*args: Any, **kwargs: Any) -> nn.Module:
    """Raises PennyweightError."""
    raise PennyweightError(
        "reference models have no counterpart here: a converted model has one integer meaning",
        hint="convert_fx, then pw.save(model, 'model.dwt').",
    )


class Scope:
    """Old name, kept for type annotations."""

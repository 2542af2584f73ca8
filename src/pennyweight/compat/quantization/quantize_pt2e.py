"""`prepare_pt2e`, `prepare_qat_pt2e`, `convert_pt2e`: an annotated graph becomes layers, rules and the core verbs."""

from __future__ import annotations

import copy
import inspect
from collections import Counter
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_unflatten

from pennyweight import pipeline
from pennyweight.compat.export import EXAMPLE
from pennyweight.compat.quantization import _annotations, _observing
from pennyweight.compat.quantization._folding import fold_norms
from pennyweight.errors import InputError
from pennyweight.graph.modularize import modularize
from pennyweight.passes import Pass
from pennyweight.passes.calibrate import Calibrate
from pennyweight.passes.fold_batch_norm import FoldBatchNorm
from pennyweight.passes.solve import Solve
from pennyweight.passes.train import Train
from pennyweight.recipe import Recipe


def prepare_pt2e(model: fx.GraphModule, quantizer: Any) -> nn.Module:
    """A model whose forwards feed the statistics that `convert_pt2e` takes its ranges from.

    Batch norms are folded before the quantizer annotates, so that it sees `conv -> relu`.

    Args:
        model: from `capture_pre_autograd_graph`, or `.module()` of an exported program; left as it is.
        quantizer: annotates nodes; see `Quantizer`.

    Raises:
        InputError: if the model is no exported graph.
        NothingQuantized: if the quantizer annotated nothing that can be quantized.
        UnrealisableSite: if an annotation asks for what the engine does not run.
    """
    return _prepare(model, quantizer, train=False)


def prepare_qat_pt2e(model: fx.GraphModule, quantizer: Any) -> nn.Module:
    """A model that trains with rounding; parameters are those of the model given, so optimizers may be made before.

    Norms and dropouts are live modules in the mode that the graph has them in. Ranges follow the batches in train mode;
    a model exported in eval mode keeps its norms frozen until `train()`.

    Args:
        model: see `prepare_pt2e`.
        quantizer: likewise.

    Raises:
        InputError, NothingQuantized, UnrealisableSite: see `prepare_pt2e`.
    """
    return _prepare(model, quantizer, train=True)


def convert_pt2e(
    model: nn.Module, use_reference_representation: bool = False, fold_quantize: bool = True
) -> nn.Module:
    """The model with integer layers, for `pw.save` or to be called; its state dict holds plain tensors.

    Weights are codes and arithmetic is on integers whatever the two options say: what they chose between is one thing
    here.

    Args:
        model: from `prepare_pt2e` or `prepare_qat_pt2e`; left as it is but for its ranges.
        use_reference_representation: read for the signature's sake.
        fold_quantize: likewise.

    Raises:
        PennyweightError: if the model was not prepared.
        EmptyCalibration: if it saw no batch but has activations to range.
    """
    pipeline.state(model)
    return pipeline.convert(_observing.finish(model))


def _prepare(model: Any, quantizer: Any, *, train: bool) -> nn.Module:
    if isinstance(model, torch.export.ExportedProgram):
        model = model.module()
    if not isinstance(model, fx.GraphModule):
        raise InputError(
            f"a {type(model).__name__} is no exported graph",
            hint="Export it: capture_pre_autograd_graph(model, args), or export_for_training(model, args).module().",
        )
    graph_module = _clone(model)
    example = _example(graph_module)
    if not train:
        fold_norms(graph_module)
    if hasattr(quantizer, "transform_for_annotation"):
        graph_module = quantizer.transform_for_annotation(graph_module)
    quantizer.annotate(graph_module)
    quantizer.validate(graph_module)
    nodes = list(graph_module.graph.nodes)
    layered = modularize(_clone(graph_module), keep_modes=train)  # nodes that become layers lose their edges
    types = {path: type(module).__name__ for path, module in layered.named_modules()}
    found = _annotations.read(nodes, layered.names, types)
    prepared = pipeline.prepare(layered, example, _recipe(found, train))
    for name, reason in found.notes:
        pipeline.journal(prepared).add("kept", name, reason=reason)
    fixed = _observing.tie(prepared, found.ties, found.fixed)
    return _observing.start(prepared, fixed, keep=True)


def _clone(model: fx.GraphModule) -> fx.GraphModule:
    """A copy of the graph that shares the parameters."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def _recipe(found: _annotations.Findings, train: bool) -> Recipe:
    passes: tuple[Pass, ...] = (FoldBatchNorm(),)
    if train:
        passes += (Train(weight="clipped", input="clipped"),)
    else:
        passes += (Calibrate(range=_most(found.inputs)), Solve(range=_most(found.weights)))
    return Recipe("pt2e-qat" if train else "pt2e", tuple(found.rules), passes)


def _most(asked: Counter[str]) -> str:
    """What most of the specs ask for: a recipe has one range rule for activations and one for weights."""
    return asked.most_common(1)[0][0] if asked else "minmax"


def _example(graph_module: fx.GraphModule) -> Any:
    """The batch that the graph was made with, or one of its shapes: zeros, which are valid identities of rows too."""
    kept = graph_module.meta.get(EXAMPLE)
    if kept is None:
        values = [n.meta.get("val") for n in graph_module.graph.nodes if n.op == "placeholder"]
        tree = getattr(graph_module, "_in_spec", None)
        if tree is None or any(v is None for v in values):
            raise InputError(
                "the graph does not say what its inputs are",
                hint="Export it with torch.export, and keep its nodes' meta.",
            )
        kept = tree_unflatten([_concrete(v) for v in values], tree)
    args, kwargs = kept
    names = inspect.signature(graph_module.forward).parameters
    return {**dict(zip(names, args, strict=False)), **kwargs} if kwargs else tuple(args)


def _concrete(value: Any) -> Any:
    """A tensor or number of the shape that the exporter recorded; its example's where a size may vary."""
    if isinstance(value, Tensor):
        return torch.zeros([_size(n) for n in value.shape], dtype=value.dtype)
    return _size(value)


def _size(value: Any) -> Any:
    return int(value.node.hint) if isinstance(value, torch.SymInt) else value

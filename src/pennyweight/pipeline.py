"""The verbs: prepare, calibrate, convert, and `quantize`, which is all three."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pennyweight import kernels as kernels  # the opaque ops that converted modules call
from pennyweight.errors import CalibrationError, EmptyCalibration, NonFinite, PennyweightError
from pennyweight.graph import Graph
from pennyweight.graph.record import call, leaves_only
from pennyweight.graph.record import record as record_graph
from pennyweight.journal import Journal
from pennyweight.measure import differences
from pennyweight.nn import twins
from pennyweight.nn.calls import CallTwin, convert_call
from pennyweight.nn.fake import ActivationQuantizer, Quantizer
from pennyweight.nn.integer import refuse_unfit_spec
from pennyweight.nn.keep import NarrowCall
from pennyweight.nn.sites import CALLS, install
from pennyweight.nn.transformer import take_plain_paths
from pennyweight.passes import Context, Normal, clone, replace_module
from pennyweight.passes.calibrate import observe
from pennyweight.passes.fold_batch_norm import FoldBatchNorm
from pennyweight.passes.solve import Solve
from pennyweight.passes.train import Train, live_norms
from pennyweight.plan import LEAVES, LayerPlan, Plan, make_plan
from pennyweight.progress import track
from pennyweight.recipe import Recipe

Batches = Iterable[Any] | Callable[[], Iterable[Any]]


@dataclass
class State:
    """What a prepared or converted model remembers of how it was made. `pw.state(model)` reads it."""

    stage: str
    recipe: Recipe
    plan: Plan
    journal: Journal
    graph: Graph
    example: Any = None
    functional_bias: dict[str, str] = field(default_factory=dict)
    folds: dict[str, str] = field(default_factory=dict)  # layer to the norm that it takes in at conversion
    outputs: dict[str, Normal] = field(default_factory=dict)  # what folded norms say of their layers' outputs
    seed: int = 0


def state(model: nn.Module) -> State:
    """The state of a prepared or converted model.

    Raises:
        PennyweightError: if the model did not come from `prepare`, `convert` or `quantize`.
    """
    found = getattr(model, "_pennyweight", None)
    if not isinstance(found, State):
        raise PennyweightError(
            "this model was not prepared by pennyweight",
            site=type(model).__name__,
            hint="Call pw.prepare first.",
        )
    return found


def journal(model: nn.Module) -> Journal:
    """The journal of a prepared or converted model."""
    return state(model).journal


def record(model: nn.Module, batch: Any) -> Graph:
    """The dataflow of one eager run on one batch; of None the layers alone, without edges."""
    return leaves_only(model, LEAVES) if batch is None else record_graph(model, [batch], LEAVES)


def graft(target: nn.Module, source: nn.Module) -> nn.Module:
    """Make `target` what `source` is, in place, for interfaces that change a model rather than return one."""
    target.__class__ = source.__class__
    target.__dict__ = source.__dict__
    return target


def prepare(
    model: nn.Module,
    example: Any,
    recipe: str | Recipe = "int8",
    *,
    seed: int = 0,
    journal: Journal | None = None,
) -> nn.Module:
    """Plan a model and replace the modules that the plan names by twins, ready to be calibrated.

    The model itself is left untouched; the result shares its parameters, keeps its class and its state-dict keys.

    Args:
        model: a float model in eval mode.
        example: one batch; a tensor, a tuple of positional arguments, or a dict of keyword arguments. None for recipes
            that range activations at run time or not at all: then modules are found by type, function calls stay float.
        recipe: name of a preset, or a `Recipe`.
        seed: of everything random in the passes.
        journal: filled if given.

    Raises:
        EmptyCalibration: if there is no example but a rule calibrates activations.
        RecipeError, PlanError, GraphError: see there.
    """
    recipe = Recipe.preset(recipe) if isinstance(recipe, str) else recipe
    if example is None and any(rule.input is not None and not rule.dynamic for rule in recipe.rules):
        raise EmptyCalibration(
            f"recipe {recipe.name!r} calibrates activations, which needs an example batch to follow the data with",
            hint="Pass one, or use a recipe that ranges activations at run time, such as 'int8-dynamic'.",
        )
    log = Journal() if journal is None else journal
    root = clone(model)
    take_plain_paths(root)
    modes = {path: module.training for path, module in root.named_modules()}
    if root.training and not recipe.trains:
        log.add("note", text="the model was in training mode; it is quantized in eval mode")
    root.eval()
    log.add("recipe", name=recipe.name, seed=seed)
    context = Context(root, record(root, example), log, seed=seed)
    context.rerecord = lambda: record(root, example)
    recipe.run(context, "float")
    context.graph = record(root, example)
    folds: dict[str, str] = {}
    plan = make_plan(context.graph, recipe.rules, matrix_shapes(root, context.graph))
    if recipe.trains:
        root, folds = _with_live_norms(model, example, recipe, log)
    for name, reason in plan.kept.items():
        log.add("kept", name, reason=reason)
    for site, spec in plan.sites().items():
        log.add("site", str(site), spec=str(spec))
    types = {path: type(m).__name__ for path, m in root.named_modules()}
    root, bias = _insert_twins(root, plan, context.graph)
    if any(layer.is_call for layer in plan.layers.values()):
        install(root, types)
        if bias or any(m.param for m in root.modules() if isinstance(m, CallTwin)):
            with torch.no_grad():
                call(root, example)  # functional layers learn their geometry
    context.model, context.plan = root, plan
    recipe.run(context, "train")
    if recipe.trains:
        _restore_modes(root, modes)
    done = State("prepared", recipe, plan, log, context.graph, example, bias, folds, context.outputs, seed)
    setattr(root, "_pennyweight", done)  # noqa: B010
    return root


def _with_live_norms(
    model: nn.Module, example: Any, recipe: Recipe, log: Journal
) -> tuple[nn.Module, dict[str, str]]:
    """The model to be trained: batch norms alive where the plan counts on their being folded at conversion.

    Returns it, and the path of each norm by that of its layer.
    """
    folds = {event.site: str(event.data["norm"]) for event in log.events if event.kind == "fold"}
    root = clone(model).eval()
    take_plain_paths(root)
    context = Context(root, record(root, example), log)
    context.rerecord = lambda: record(root, example)
    for step in recipe.passes:
        if step.stage == "float" and not isinstance(step, FoldBatchNorm):
            step.run(context)
    live_norms(root, folds)
    return root, folds


def _restore_modes(root: nn.Module, modes: dict[str, bool]) -> None:
    """Train or eval mode as the model was given; what is new takes after what it stands in."""
    for path, module in root.named_modules():
        around = path
        while around not in modes:
            around = around.rpartition(".")[0]
        module.training = modes[around]


def matrix_shapes(root: nn.Module, graph: Graph) -> dict[str, dict[str, tuple[int, ...]]]:
    """Shapes of the weights' matrix views by layer name and weight name."""
    params = dict(root.named_parameters())
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for node in graph:
        if node.kind == "module" and node.op in twins:
            found[node.name] = dict(twins[node.op].shapes(root.get_submodule(node.path)))
        elif node.kind == "call" and node.op == "linear" and node.params.get(1) in params:
            found[node.name] = {"weight": tuple(params[node.params[1]].shape)}
    return found


def _insert_twins(root: nn.Module, plan: Plan, graph: Graph) -> tuple[nn.Module, dict[str, str]]:
    """Swap in the twins; returns the model (a single layer is its own twin), and the bias of functional layers."""
    modules = dict(root.named_modules())
    nodes = {node.name: node for node in graph}
    bias: dict[str, str] = {}
    for name, layer in plan.layers.items():
        if not layer.is_call:
            old = modules[name]
            new = (
                twins[layer.kind].prepare(old, layer) if not layer.keep else twins["keep"].prepare(old, layer)
            )
            replace_module(root, old, new)
            root = new if old is root else root
            continue
        path, _, key = name.partition(":")
        owner = root.get_submodule(path)
        if CALLS not in owner._modules:
            owner.add_module(CALLS, nn.ModuleDict())
        params = nodes[name].params
        twin = NarrowCall(layer) if layer.keep else CallTwin(layer, params.get(1, ""))
        cast("nn.ModuleDict", owner._modules[CALLS])[key] = twin
        if 2 in params:
            bias[name] = params[2]
    return root, bias


def calibrate(
    model: nn.Module,
    batches: Batches,
    *,
    progress: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
) -> nn.Module:
    """Run the batches through a prepared model and set every range and every code.

    Args:
        model: from `prepare`; changed in place and returned.
        batches: iterable of batches, or a function that makes one; ignored where the recipe needs no data, read once
            unless a pass of the recipe replays them: then batches that can be read only once are held in memory. A
            recipe that needs no data takes the example where there is no batch.
        progress: show a bar.
        checkpoint: folder in which passes that take long keep what they have found, block by block; a second call with
            the same model, data and recipe goes on from there and ends with the same bytes.

    Raises:
        EmptyCalibration: if there is no batch but the recipe needs some.
        NonFinite: if a batch makes NaN or infinity at a site, naming both.
    """
    st = state(model)
    if st.stage != "prepared":
        raise CalibrationError(
            f"the model is {st.stage}, not prepared", hint="Calibrate once, after pw.prepare."
        )
    found = [m for m in model.modules() if isinstance(m, ActivationQuantizer)]
    modes = {path: module.training for path, module in model.named_modules()}
    replay = _source(st, batches)
    context = Context(model, st.graph, st.journal, st.plan, replay, st.seed)
    context.outputs, context.progress = st.outputs, progress
    context.checkpoint = None if checkpoint is None else Path(checkpoint)
    st.recipe.run(context, "adapt")
    if st.recipe.trains:  # calibration sees the float model, and changes nothing but ranges
        _switch(model.eval(), False)
    needs = st.recipe.needs()
    if found and needs:
        seen = observe(model, needs, _finite(track(replay(), "calibrate", show=progress)))
        if seen == 0:
            raise EmptyCalibration(
                f"recipe {st.recipe.name!r} calibrates {len(found)} activations but there is no batch",
                hint="Pass a few hundred inputs, or use recipe 'int8-dynamic', which needs none.",
            )
        st.journal.add("calibration", batches=seen)
    st.recipe.run(context, "calibrate")
    if st.recipe.trains:
        for step in st.recipe.passes:
            if isinstance(step, Solve):
                step.run(context)
        for step in st.recipe.passes:
            if isinstance(step, Train):
                step.initialise(context)
        _switch(model, True)
        _restore_modes(model, modes)
    else:
        st.recipe.run(context, "solve")
    for quantizer in found:
        quantizer.statistics.clear()
        quantizer.active = True
    st.stage = "calibrated"
    return model


def _source(st: State, batches: Batches) -> Callable[[], Iterable[Any]]:
    """A function that gives the batches, as often as the recipe's passes will ask for them."""
    if not callable(batches) and iter(batches) is batches and st.recipe.replays:
        batches = list(batches)
    if st.recipe.data_free and not callable(batches):
        stream = iter(batches)
        first = next(stream, None)
        if first is None:
            batches = [] if st.example is None else [st.example]
        elif stream is batches:
            batches = _with_first(first, stream)
    if callable(batches):
        return batches
    held = batches
    return lambda: held


def _switch(model: nn.Module, active: bool) -> None:
    """Rounding on or off everywhere."""
    for module in model.modules():
        if isinstance(module, Quantizer):
            module.active = active


def _finite(batches: Iterable[Any]) -> Iterator[Any]:
    """The batches.

    Raises:
        NonFinite: if one holds NaN or infinity.
    """
    for index, batch in enumerate(batches):
        for leaf in tree_leaves(batch):
            if (
                not isinstance(leaf, Tensor)
                or not leaf.is_floating_point()
                or bool(torch.isfinite(leaf).all())
            ):
                continue
            bad = int((~torch.isfinite(leaf)).sum())
            raise NonFinite(
                f"{bad} of {leaf.numel()} values of calibration batch {index} are NaN or infinite",
                site="input",
                shapes=str(tuple(leaf.shape)),
                hint="Clean the data, or drop that batch.",
            )
        yield batch


def convert(model: nn.Module) -> nn.Module:
    """Replace the twins of a calibrated model by integer modules; the float weights are gone from it.

    Raises:
        CalibrationError: if the model is not calibrated.
    """
    st = state(model)
    if st.stage != "calibrated" and not (st.recipe.trains and st.stage == "prepared"):
        raise CalibrationError(f"the model is {st.stage}, not calibrated", hint="Call pw.calibrate first.")
    before = model_bytes(model)
    params = dict(model.named_parameters())
    root = clone(model)
    for step in st.recipe.passes:
        if isinstance(step, Train):
            step.finish(root, st.folds)
    for module in list(root.modules()):
        layer = getattr(module, "layer", None)
        if isinstance(module, CallTwin):
            bias = st.functional_bias.get(module.layer.name)
            new = convert_call(module, None if bias is None else params[bias].detach().float())
        elif isinstance(layer, LayerPlan) and hasattr(module, "solved"):
            new = twins[layer.kind].convert(module) if not layer.keep else twins["keep"].convert(module)
        else:
            continue
        for hook_set in ("_forward_pre_hooks", "_forward_hooks", "_forward_pre_hooks_with_kwargs",
                         "_forward_hooks_always_called", "_forward_hooks_with_kwargs"):  # fmt: skip
            getattr(new, hook_set).update(getattr(module, hook_set))
        replace_module(root, module, new)
        root = new if module is root else root
    log = Journal(list(st.journal.events))
    log.add("size", before=before, after=model_bytes(root))
    plan_state = State("converted", st.recipe, st.plan, log, st.graph, st.example, st.functional_bias)
    setattr(root, "_pennyweight", plan_state)  # noqa: B010
    root.eval()
    if st.recipe.trains and st.example is not None:
        log.add("integers", **_rounding_apart(model, root, st.example))
    return root


def _rounding_apart(trained: nn.Module, integer: nn.Module, example: Any) -> dict[str, float]:
    """How far integer outputs are from the fake-quantized ones they were trained as, in eval mode."""
    modes = {path: module.training for path, module in trained.named_modules()}
    try:
        with torch.no_grad():
            results = [
                [
                    t.detach().float().cpu().numpy()
                    for t in tree_leaves(call(m, example))
                    if isinstance(t, Tensor)
                ]
                for m in (trained.eval(), integer)
            ]
    finally:
        _restore_modes(trained, modes)
    return differences(*results)


def model_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, each storage once."""
    tensors = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def quantize(
    model: nn.Module,
    batches: Batches | None = None,
    recipe: str | Recipe = "int8",
    *,
    example: Any = None,
    keep_slow_layers_float: bool = False,
    seed: int = 0,
    journal: Journal | None = None,
    progress: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
) -> nn.Module:
    """Prepare, calibrate and convert in one call.

    Args:
        model: a float model; left untouched.
        batches: calibration inputs: an iterable of batches, or a function that makes one. A batch is a tensor, a tuple
            of positional arguments, or a dict of keyword arguments. A recipe without calibration needs one batch, as
            an example, or `example`.
        recipe: name of a preset ("int8", "int8-dynamic", "int8-weight", ...) or a `Recipe`.
        example: the batch to record the model with; the first one of `batches` otherwise.
        keep_slow_layers_float: measure the result layer by layer on this machine, keep those layers in float that float
            does faster, and quantize again, as `keep_slow.without_slow_layers` says. Batches that can be read only once
            are held in memory for it.
        seed: of everything random.
        journal: filled if given; `pw.journal(result)` has it in any case.
        progress: show bars.
        checkpoint: see `calibrate`.

    Returns:
        A module of the same class, whose layers hold integer codes.

    Raises:
        EmptyCalibration: if there is neither a batch nor an example.
        RecipeError, PlanError, GraphError, NonFinite: see there.
        NothingQuantized: if all layers are to be kept in float because they are faster so.
    """
    if keep_slow_layers_float:
        from pennyweight.keep_slow import without_slow_layers

        again = batches if batches is None or callable(batches) else _readable_again(batches)

        def make(changed: Recipe) -> nn.Module:
            return quantize(model, again, changed, example=example, seed=seed, progress=progress)

        result = without_slow_layers(
            model, Recipe.preset(recipe) if isinstance(recipe, str) else recipe, make
        )
        if journal is not None:
            journal.events[:] = state(result).journal.events
        return result
    log = Journal() if journal is None else journal
    source = batches() if callable(batches) else batches
    stream = iter(source if source is not None else ())
    if example is None:
        first = next(stream, None)
        if first is None:
            raise EmptyCalibration(
                "there is no calibration batch", hint="Pass an iterable with at least one input."
            )
        example = first
        stream = _with_first(first, stream)
    prepared = prepare(model, example, recipe, seed=seed, journal=log)
    for layer in state(prepared).plan.layers.values():
        refuse_unfit_spec(layer)  # what is prepared alone may simulate anything
    result = convert(calibrate(prepared, stream, progress=progress, checkpoint=checkpoint))
    if journal is not None:
        journal.events[:] = state(result).journal.events
    return result


def _readable_again(batches: Iterable[Any]) -> Iterable[Any]:
    return list(batches) if iter(batches) is batches else batches


def _with_first(first: Any, rest: Iterator[Any]) -> Iterator[Any]:
    yield first
    yield from rest

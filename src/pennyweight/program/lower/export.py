"""From a module to the exporter's graph, with the sizes that may vary left open."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from pennyweight.errors import LowerError, nearest

Dynamic = bool | Mapping[str | int, Sequence[int]]
AUTO: Any = torch.export.Dim.AUTO


@dataclass(frozen=True, slots=True)
class Leaf:
    """A tensor of the example, and which of its axes may be of any size.

    Attributes:
        name: of the argument it belongs to.
        axes: open axes; the exporter closes those that the model fixes.
        asked: whether all of them were asked for by name, so that a closed one is an error.
        batch: the axis of the samples, which is worth a second attempt if it closes; -1 where there is none.
    """

    name: str
    axes: tuple[int, ...]
    asked: bool
    batch: int


def export(model: nn.Module, example: Any, dynamic: Dynamic) -> tuple[Any, list[str]]:
    """The exported program, and a note for every sample axis that the model fixes.

    Sizes of open axes stay symbols. A model that asks for `len(x)` gets a number from the fast exporter; then the one
    that reads bytecode is tried, which keeps it open.

    Raises:
        LowerError: if the model has no whole-graph form, or fixes an axis that `dynamic` names.
    """
    args, kwargs = arguments(example)
    flat, tree = tree_flatten((args, kwargs))
    leaves: list[Leaf | None] = [None] * len(flat)
    if dynamic:
        leaves = open_axes(model, args, kwargs, dynamic)
    flat = [_at_least_two(x, leaf) for x, leaf in zip(flat, leaves, strict=True)]
    args, kwargs = tree_unflatten(flat, tree)
    if not any(leaf is not None and leaf.axes for leaf in leaves):
        return _attempt(model, args, kwargs, None, strict=False), []
    spec = tree_unflatten([_spec(leaf) for leaf in leaves], tree)
    shapes = spec[1] if kwargs else spec[0]
    try:
        found = _attempt(model, args, kwargs, shapes, strict=False)
    except LowerError:
        if any(leaf is not None and leaf.asked for leaf in leaves):
            raise
        found = _attempt(model, args, kwargs, None, strict=False)
        return found, [
            "the model fixes every size: " + ", ".join(str(tuple(x.shape)) for x in flat if _is_tensor(x))
        ]
    if _closed(found, leaves):
        try:
            other = _attempt(model, args, kwargs, shapes, strict=True)
        except LowerError:
            other = found
        found = other if len(_closed(other, leaves)) < len(_closed(found, leaves)) else found
    notes = []
    for name, axis, asked in _closed(found, leaves):
        text = f"the model fixes the size of axis {axis} of input {name!r}"
        if asked:
            raise LowerError(text, site=f"input {name}", hint="Leave the axis out of `dynamic`.")
        notes.append(text)
    return found, notes


def arguments(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of a batch."""
    if isinstance(example, Mapping):
        return (), dict(example)
    return (tuple(example) if isinstance(example, tuple | list) else (example,)), {}


def open_axes(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic: Dynamic
) -> list[Leaf | None]:
    """What may vary, for every leaf of the example in order; None for what is no tensor.

    Unless `dynamic` says otherwise: axis 0 of every tensor; axis 1 of integer, bool and rank-3 float tensors, which is
    the length of a sequence; of states in tuples, [layers, N, H], axis 1 alone.

    Raises:
        LowerError: if `dynamic` names an argument or axis that there is not.
    """
    parameters = list(inspect.signature(model.forward).parameters)
    named = {(parameters[i] if i < len(parameters) else str(i)): a for i, a in enumerate(args)} | kwargs
    asked: dict[str, Sequence[int]] = {}
    if isinstance(dynamic, Mapping):
        names = list(named)
        for key, axes in dynamic.items():
            name = names[key] if isinstance(key, int) and 0 <= key < len(names) else str(key)
            if name not in named:
                raise LowerError(f"there is no input {key!r}", hint=nearest(str(key), names, "inputs"))
            asked[name] = axes
    found: list[Leaf | None] = []
    for name, value in named.items():
        for x in tree_flatten(value)[0]:
            if not _is_tensor(x):
                found.append(None)
            elif isinstance(dynamic, Mapping):
                axes = tuple(asked.get(name, ()))
                if any(not 0 <= a < x.ndim for a in axes):
                    raise LowerError(
                        f"input {name!r} has no such axis", shapes=f"{tuple(x.shape)}, axes {list(axes)}"
                    )
                found.append(Leaf(name, axes, True, -1))
            else:
                found.append(_usual(name, x, nested=not _is_tensor(value)))
    return found


def _usual(name: str, x: Tensor, nested: bool) -> Leaf:
    if nested and x.ndim == 3 and x.is_floating_point():
        return Leaf(name, (1,), False, 1)
    sequence = x.ndim > 1 and (not x.is_floating_point() or x.ndim == 3)
    return Leaf(name, (0, 1) if sequence else (0,), False, 0) if x.ndim else Leaf(name, (), False, -1)


def _is_tensor(x: Any) -> bool:
    return isinstance(x, Tensor)


def _at_least_two(x: Any, leaf: Leaf | None) -> Any:
    """The example with two entries where an open axis has one: the exporter takes sizes of 1 for constants."""
    for axis in leaf.axes if leaf is not None else ():
        if x.shape[axis] == 1 and (
            leaf is None or leaf.asked or axis == leaf.batch or not x.is_floating_point()
        ):
            x = torch.cat([x, x], axis)
    return x


def _spec(leaf: Leaf | None) -> Any:
    return None if leaf is None else dict.fromkeys(leaf.axes, AUTO)


def _closed(exported: Any, leaves: list[Leaf | None]) -> list[tuple[str, int, bool]]:
    """Input, axis and whether it was asked for, of the axes that became numbers and matter."""
    nodes = {n.name: n for n in exported.graph.nodes if n.op == "placeholder"}
    names = [s.arg.name for s in exported.graph_signature.input_specs if s.kind.name == "USER_INPUT"]
    out = []
    for name, leaf in zip(names, leaves, strict=True):
        value = nodes[name].meta.get("val") if name in nodes else None
        if leaf is None or not isinstance(value, Tensor):
            continue
        for axis in leaf.axes:
            if is_number(value.shape[axis]) and (leaf.asked or axis == leaf.batch):
                out.append((leaf.name, axis, leaf.asked))
    return out


def is_number(size: Any) -> bool:
    """Whether a size of the exported graph is fixed: an integer, or a symbol that the exporter has bound to one."""
    return isinstance(size, int) or bool(size.node.expr.is_number)


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Torch's fused inference kernels off: they have no form but their own."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _attempt(model: nn.Module, args: Any, kwargs: Any, shapes: Any, strict: bool) -> Any:
    try:
        with torch.no_grad(), warnings.catch_warnings(), _plain_attention():
            warnings.simplefilter("ignore")
            return torch.export.export(model.eval(), args, kwargs, dynamic_shapes=shapes, strict=strict)
    except Exception as error:
        raise LowerError(
            f"the model has no whole-graph form: {first_line(error)}",
            site=_user_line(error),
            hint="It runs quantized all the same; only whole-graph files need it. "
            "Usual causes: control flow on tensor values, .item(), data leaving torch.",
        ) from error


def first_line(error: BaseException) -> str:
    """Type and first line of an error."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def _user_line(error: BaseException) -> str:
    """The innermost line of user code in an error's traceback."""
    where = ""
    current: BaseException | None = error
    while current is not None:
        trace = current.__traceback__
        while trace is not None:
            filename = trace.tb_frame.f_code.co_filename
            if "/torch/" not in filename and "/pennyweight/" not in filename and "contextlib" not in filename:
                where = f"{filename}:{trace.tb_lineno} in {trace.tb_frame.f_code.co_name}"
            trace = trace.tb_next
        current = current.__cause__ or current.__context__
    return where

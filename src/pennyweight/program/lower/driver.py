"""Export, walk, verify, rewrite, verify."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from pennyweight.errors import InputError, LowerError, PennyweightError, VerifyError, nearest
from pennyweight.nn.sites import CALLS
from pennyweight.program.bounds import check_sizes
from pennyweight.program.ir import Program, TensorType
from pennyweight.program.lower import activations, integers, layers, movement, recurrent, tensors  # noqa: F401 (register handlers)
from pennyweight.program.lower.builder import _DTYPES, Builder, Stored, Value, handlers
from pennyweight.program.lower.export import Dynamic, arguments, export, first_line, is_number
from pennyweight.program.rewrite import optimize
from pennyweight.program.verify import infer, verify


def lower(model: nn.Module, example: Any, *, dynamic: Dynamic = True, optimized: bool = True) -> Program:
    """The whole model as a program.

    Args:
        model: a converted model (a float one gives a float program).
        example: one batch; a tensor, a tuple of positional arguments, or a dict of keyword arguments.
        dynamic: let axis 0 of every input be of any size, and the length of sequences (axis 1 of integer and of rank-3
            float inputs); states in a tuple, [layers, N, H], vary in axis 1. Axes that the model fixes are fixed; if
            that is the batch, `meta["fixed"]` says so. A mapping from input name or position to axes, for example
            `{"x": (0, 1), "state": (1,)}`, opens these and no others. False fixes the sizes of the example.
        optimized: join floats between codes into integer ops (`rewrite`); off, the program is the model op by op.

    Raises:
        LowerError: if the model has control flow that depends on data, or calls an op that has no program form;
            the error names the line. Everything but whole-graph files still works then. Also if the model fixes an
            axis that `dynamic` names.
        VerifyError: if the program breaks its own rules, which is a defect of this package.
    """
    exported, fixed = export(model, example, dynamic)
    builder = _walk(exported)
    if fixed:
        builder.program.meta["fixed"] = "; ".join(fixed)
    verify(builder.program)
    program = optimize(builder.program) if optimized else builder.program
    verify(program)
    _keep_sizes(program, example)
    return program


def _keep_sizes(program: Program, example: Any) -> None:
    """Put the example's own sizes of 1 where the exporter wanted 2, if the program takes them."""
    given = [x for x in tree_flatten(arguments(example))[0] if isinstance(x, Tensor)]
    if len(given) != len(program.inputs):
        return
    try:
        symbols = program.bind({n: tuple(x.shape) for n, x in zip(program.inputs, given, strict=True)})
        check_sizes(program, infer(program, symbols))
    except (InputError, VerifyError):
        return
    program.symbols.update(symbols)


def _walk(exported: Any) -> Builder:
    graph, signature = exported.graph, exported.graph_signature
    state: dict[str, Tensor] = {**exported.state_dict, **exported.constants}
    names = {s.arg.name: s for s in signature.input_specs}
    symbols, rename = _symbols(graph, names)
    builder = Builder(symbols, rename)
    env: dict[Node, Any] = {}
    for node in graph.nodes:
        builder.site, builder.where = _site(node), _line(node)
        if node.op == "placeholder":
            env[node] = _placeholder(builder, node, names[node.name], state)
        elif node.op == "get_attr":
            env[node] = Stored(str(node.target), getattr(exported.graph_module, str(node.target)))
        elif node.op == "call_function":
            env[node] = _call(builder, node, env)
        elif node.op == "output":
            flat = [env[a] if isinstance(a, Node) else a for a in node.args[0]]
            tree = tree_unflatten(_output_indices(builder, flat, signature), exported.call_spec.out_spec)
            builder.program.tree = _plain(tree)
    return builder


def _symbols(graph: Any, names: dict[str, Any]) -> tuple[dict[str, int], dict[str, str]]:
    symbols: dict[str, int] = {}
    rename: dict[str, str] = {}
    for node in graph.nodes:
        value = node.meta.get("val")
        if node.op != "placeholder" or not isinstance(value, Tensor):
            continue
        sizes: Any = value.shape
        for axis, size in enumerate(sizes):
            if is_number(size):
                continue
            text = str(size.node.expr)
            if text in rename:
                continue
            name = "batch" if axis == 0 else "length" if axis == 1 else f"size{axis}"
            while name in symbols:
                name += "_"
            rename[text] = name
            symbols[name] = int(size.node.hint)
    return symbols, rename


def _placeholder(builder: Builder, node: Node, spec: Any, state: dict[str, Tensor]) -> Any:
    if spec.kind.name == "USER_INPUT":
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            return value
        dtype = _DTYPES.get(value.dtype)
        if dtype not in ("f32", "i64", "bool", "u8"):
            raise LowerError(
                f"input {node.name} is {value.dtype}", hint="Inputs are float32, int64, uint8 or bool."
            )
        shape = tuple(builder.dims(value.shape))
        builder.program.inputs[node.name] = TensorType(dtype, shape)
        builder.types[node.name] = TensorType(
            dtype, tuple(int(s.node.hint) if hasattr(s, "node") else s for s in value.shape)
        )
        return Value(node.name, shape, dtype)
    return Stored(spec.target, state[spec.target])


def _call(builder: Builder, node: Node, env: dict[Node, Any]) -> Any:
    def look(x: Any) -> Any:
        return env[x] if isinstance(x, Node) else x

    args, kwargs = tree_map(look, (node.args, node.kwargs))
    target = node.target
    if target is operator.getitem:
        return args[0][args[1]]
    if not isinstance(target, torch._ops.OpOverload):
        return _size_arithmetic(node)
    name = str(target)
    if name.startswith("aten.sym_size") or name.startswith("aten.sym_numel"):
        return node.meta["val"]
    handler = handlers.get(name)
    in_place = False
    if handler is None and "_." in name:
        handler = handlers.get(name.replace("_.", ".", 1))
        in_place = handler is not None
    if handler is None:
        raise LowerError(
            f"{name} has no program form yet",
            site=builder.site or node.name,
            hint=f"{builder.where} {_similar(name)}",
        )
    try:
        result = handler(builder, args, _Kwargs(kwargs, node))
    except PennyweightError:
        raise
    except Exception as error:
        raise LowerError(f"{name}: {first_line(error)}", site=builder.site, hint=builder.where) from error
    result = _with_sizes(builder, result, node.meta.get("val"))
    if in_place and isinstance(node.args[0], Node):
        env[node.args[0]] = result
    return result


def _similar(name: str) -> str:
    """Lowered ops that begin alike."""
    start = name.rpartition(".")[0][:8]
    known = [n for n in handlers if n.startswith(start)]
    return nearest(name, known, "Similar ops that have one") if known else ""


class _Kwargs(dict[str, Any]):
    """Keyword arguments of a call, with the node they came from."""

    def __init__(self, values: dict[str, Any], node: Node) -> None:
        super().__init__(values)
        self.node = node


def _with_sizes(builder: Builder, result: Any, meta: Any) -> Any:
    """Give values the symbolic sizes that the exporter knows."""
    if isinstance(result, Value) and isinstance(meta, Tensor):
        return builder.shaped(result, builder.dims(meta.shape))
    if isinstance(result, list | tuple) and isinstance(meta, list | tuple):
        return [_with_sizes(builder, r, m) for r, m in zip(result, meta, strict=False)]
    return result


def _size_arithmetic(node: Node) -> Any:
    """Python arithmetic on sizes: the exporter has already worked it out."""
    if "val" not in node.meta:
        raise LowerError(f"{node.target} has no program form", site=node.name)
    return node.meta["val"]


def _output_indices(builder: Builder, flat: list[Any], signature: Any) -> list[int | None]:
    indices: list[int | None] = []
    kinds = [s.kind.name for s in signature.output_specs]
    for value, kind in zip(flat, kinds, strict=True):
        if kind != "USER_OUTPUT":
            continue
        if value is None:
            indices.append(None)
            continue
        indices.append(len(builder.program.outputs))
        builder.program.outputs.append(builder.value(value).name)
    return indices


def _plain(tree: Any) -> Any:
    if isinstance(tree, Mapping):
        return {str(k): _plain(v) for k, v in tree.items()}
    if isinstance(tree, list | tuple):
        return [_plain(v) for v in tree]
    return tree


def _site(node: Node) -> str:
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = cast("str", list(stack.values())[-1][0])
    path = path.removeprefix("L['self'].").removeprefix("L__self__").lstrip(".")
    owner, call, name = path.rpartition(f"{CALLS}.")  # a function call, by the name that the plan gives it
    return f"{owner.rstrip('.')}:{name}" if call else path


def _line(node: Node) -> str:
    """The user's line that made a node."""
    trace = node.meta.get("stack_trace") or ""
    lines = [ln.strip() for ln in trace.splitlines() if ln.strip().startswith("File")]
    user = [ln for ln in lines if "/torch/" not in ln and "/pennyweight/" not in ln]
    return f"{(user or lines)[-1]}." if lines else ""

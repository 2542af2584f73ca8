"""The opaque ops on the engine: each layer is a small program, lowered as it would be within a whole model.

So the converted module and its program run on the same kernels. Where there is no library, for tensors that are not on
the CPU, and under `PENNYWEIGHT_EAGER=reference`, the torch reference runs instead.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from pennyweight.errors import KernelError
from pennyweight.program.ir import TensorType
from pennyweight.runtime import library

# arguments that change from call to call; every other tensor is stored with the model
ACTIVATIONS = frozenset({"x", "a", "b", "q", "k", "v", "mask", "h", "c", "ids"})
# one pass over memory, or float convolutions, which torch does best: nothing to gain
ON_REFERENCE = frozenset(
    {
        "round_to_codes",
        "embedding",
        "decode",
        "decode_levels",
        "conv_weight",
        "conv_levels",
        "past_attention",
        "past_attention_rounded",
        "hadamard",
    }
)

_programs: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # first stored tensor -> {key: engine}


def backend() -> str:
    """What converted modules run on: "native" or "reference"."""
    if os.environ.get("PENNYWEIGHT_EAGER") == "reference":
        return "reference"
    try:
        library.load()
    except KernelError:
        return "reference"
    return "native"


def engine_op(name: str, schema: str, reference: Callable[..., Any]) -> Callable[..., Any]:
    """The implementation of an op: the engine where it can run, the reference elsewhere.

    Args:
        name: of the op.
        schema: its torch schema.
        reference: what defines it.
    """
    if name in ON_REFERENCE:
        return reference
    arguments = schema[1 : schema.index(") ->")].split(", ")
    names = [a.split(" ")[1].split("=")[0] for a in arguments]
    moving = [i for i, n in enumerate(names) if n in ACTIVATIONS and arguments[i].startswith("Tensor")]
    stored = [i for i, a in enumerate(arguments) if a.startswith("Tensor") and i not in moving]

    def run(*given: Any) -> Any:
        args = (*given, *[None] * (len(arguments) - len(given)))  # optional tensors may be left out
        if not _fits(args, moving, stored) or backend() == "reference":
            return reference(*args)
        holder = args[stored[0]]
        engines = _programs.setdefault(holder, {})
        key = _key(args, moving, stored)
        if key not in engines:
            engines.clear()  # other keys are other versions of the same tensors, or other ranks
            engines[key] = _engine(name, args, moving, stored)
        return _call(engines[key], [args[i] for i in moving if args[i] is not None])

    return run


def _fits(args: tuple[Any, ...], moving: list[int], stored: list[int]) -> bool:
    tensors = [args[i] for i in (*moving, *stored) if args[i] is not None]
    if any(t.device.type != "cpu" for t in tensors) or any(
        args[i] is not None and args[i].numel() == 0 for i in moving
    ):
        return False
    dtypes = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.bool)
    return all(args[i] is None or args[i].dtype in dtypes for i in moving)


def _key(args: tuple[Any, ...], moving: list[int], stored: list[int]) -> tuple[Any, ...]:
    parts: list[Any] = []
    for i, a in enumerate(args):
        if i in moving:
            parts.append(None if a is None else (a.ndim, a.dtype == torch.bool))
        elif i in stored:
            parts.append(None if a is None else (id(a), a._version, a.data_ptr()))
        else:
            parts.append(tuple(a) if isinstance(a, list) else a)
    return tuple(parts)


def _engine(name: str, args: tuple[Any, ...], moving: list[int], stored: list[int]) -> Any:
    from pennyweight.program.lower.builder import Builder, Stored, Value, handlers
    from pennyweight.program.rewrite.clean import drop_dead
    from pennyweight.program.rewrite.layout import sink_transposes
    from pennyweight.runtime.engine import Engine
    from pennyweight.runtime.widen import widened

    symbols: dict[str, int] = {}
    types: dict[int, TensorType] = {}
    for i in moving:
        if args[i] is not None:
            sizes = [f"s{i}_{axis}" for axis in range(args[i].ndim)]
            symbols.update(zip(sizes, args[i].shape, strict=True))
            types[i] = TensorType("bool" if args[i].dtype == torch.bool else "f32", tuple(sizes))
    builder = Builder(symbols, {})
    builder.site = name
    operands: list[Any] = list(args)
    for i, type_ in types.items():
        builder.program.inputs[f"x{i}"] = type_
        builder.types[f"x{i}"] = TensorType(type_.dtype, tuple(args[i].shape))
        operands[i] = Value(f"x{i}", type_.shape, type_.dtype)
    for i in stored:
        operands[i] = None if args[i] is None else Stored(f"c{i}", args[i])
    result = handlers[f"pennyweight.{name}.default"](builder, tuple(operands), {})
    results = result if isinstance(result, list | tuple) else [result]
    builder.program.outputs = [r.name for r in results]
    program = widened(drop_dead(sink_transposes(builder.program)))
    return Engine(program, threads=torch.get_num_threads())


def _call(engine: Any, tensors: list[Tensor]) -> Any:
    arrays = [(t if t.dtype == torch.bool else t.float()).detach().contiguous().numpy() for t in tensors]
    outputs = engine.run(dict(zip(engine.program.inputs, arrays, strict=True)))
    found = [torch.from_numpy(outputs[n]) for n in engine.program.outputs]
    return found[0] if len(found) == 1 else tuple(found)

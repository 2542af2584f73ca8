"""What lowering writes into: a growing program, and the values that stand for the exported graph's nodes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import sympy
import torch
from torch import Tensor
from torch.utils._sympy.functions import FloorDiv, Mod, PythonMod

from pennyweight.errors import LowerError
from pennyweight.program.ir import Array, Constant, Dim, Op, Program, TensorType, resolve
from pennyweight.program.ops import definitions

Handler = Callable[["Builder", Any, Any], Any]
handlers: dict[str, Handler] = {}

_DTYPES = {
    torch.float32: "f32",
    torch.float64: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int8: "i8",
    torch.int16: "i16",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "bool",
}


def handles(*names: str) -> Callable[[Handler], Handler]:
    """Register how torch ops ("aten.relu.default", "aten.add.Tensor") are lowered."""

    def wrap(handler: Handler) -> Handler:
        for name in names:
            handlers[name] = handler
        return handler

    return wrap


@dataclass(frozen=True, slots=True)
class Value:
    """A tensor of the exported graph: its name in the program, and its size there, symbols included."""

    name: str
    shape: tuple[Dim, ...]
    dtype: str

    @property
    def rank(self) -> int:
        """Number of axes."""
        return len(self.shape)


@dataclass(frozen=True, slots=True)
class Stored:
    """A parameter, buffer or constant of the model, not yet part of the program."""

    name: str
    tensor: Tensor


class Builder:
    """Emits ops and keeps the type of every value, for the sizes of the example.

    Args:
        symbols: name and example size of every symbol.
        rename: from the exporter's symbols to ours.
    """

    def __init__(self, symbols: dict[str, int], rename: dict[str, str]) -> None:
        self.program = Program({}, [], [], {}, symbols)
        self.rename = rename
        self.types: dict[str, TensorType] = {}
        self.counter = 0
        self.site = ""
        self.where = ""
        self.stored: dict[tuple[str, str], str] = {}

    # -- values -------------------------------------------------------------------------------------------------

    def fresh(self, hint: str) -> str:
        """A new value name."""
        self.counter += 1
        return f"{hint}.{self.counter}"

    def emit(self, kind: str, inputs: Sequence[Value | None], **attrs: Any) -> Value:
        """Append an op of one result and return its value. Raises LowerError if the operands do not fit."""
        (value,) = self.emit_all(kind, inputs, **attrs)
        return value

    def emit_all(self, kind: str, inputs: Sequence[Value | None], **attrs: Any) -> list[Value]:
        """Append an op and return all its values.

        Raises:
            LowerError: if the operands do not fit.
        """
        names = tuple("" if i is None else i.name for i in inputs)
        operands = [self.types[n] if n else None for n in names]
        try:
            results = definitions[kind].infer(operands, resolve(attrs, self.program.symbols))
        except Exception as error:
            raise LowerError(f"{kind}: {error}", site=self.site, hint=self.where) from error
        outputs = tuple(self.fresh(kind) for _ in results)
        self.program.ops.append(Op(kind, names, outputs, attrs, self.site))
        self.types.update(zip(outputs, results, strict=True))
        return [Value(n, t.shape, t.dtype) for n, t in zip(outputs, results, strict=True)]

    def made_from(self, value: Value) -> str:
        """The dtype that a value was cast from, or ""."""
        cast = next((op for op in reversed(self.program.ops) if value.name in op.outputs), None)
        return self.types[cast.inputs[0]].dtype if cast is not None and cast.kind == "cast" else ""

    def shaped(self, value: Value, shape: Sequence[Dim]) -> Value:
        """The same value with its symbolic sizes known."""
        return Value(value.name, tuple(shape), value.dtype)

    def constant(self, data: Array | Tensor, hint: str, dtype: str = "") -> Value:
        """A program constant; equal names with equal content are one."""
        if isinstance(data, Tensor):
            dtype = dtype or _DTYPES[data.dtype]
            data = data.detach().cpu()
            data = data.view(torch.uint16) if data.dtype == torch.bfloat16 else data
            data = data.float() if data.dtype == torch.float64 else data
            array = data.contiguous().numpy()
        else:
            array = np.ascontiguousarray(data).reshape(data.shape)
            dtype = (
                dtype
                or {
                    "float32": "f32",
                    "int64": "i64",
                    "int32": "i32",
                    "int8": "i8",
                    "int16": "i16",
                    "uint8": "u8",
                    "bool": "bool",
                }[str(array.dtype)]
            )
        key = (
            dtype + str(array.shape),
            array.tobytes().hex() if array.nbytes < 64 else str(hash(array.tobytes())),
        )
        if key not in self.stored:
            name = hint
            while name in self.types:
                name = self.fresh(hint)
            self.program.constants[name] = Constant(dtype, array.copy())
            self.types[name] = TensorType(dtype, tuple(array.shape))
            self.stored[key] = name
        name = self.stored[key]
        return Value(name, self.types[name].shape, dtype)

    def value(self, x: Any) -> Value:
        """A graph argument as a value; parameters become constants, numbers 0-d constants."""
        if isinstance(x, Value):
            return x
        if isinstance(x, Stored):
            return self.constant(x.tensor, x.name)
        if isinstance(x, bool):
            return self.constant(np.asarray(x), "number")
        if isinstance(x, int):
            return self.constant(np.asarray(x, np.int64), "number")
        if isinstance(x, float):
            return self.constant(np.asarray(x, np.float32), "number")
        raise LowerError(f"{type(x).__name__} is no tensor", site=self.site, hint=self.where)

    def stored_tensor(self, x: Any) -> Tensor:
        """The data of an argument that must be stored with the model.

        Raises:
            LowerError: if it is computed at run time.
        """
        if isinstance(x, Stored):
            return x.tensor.detach()
        raise LowerError("this operand must be stored with the model", site=self.site, hint=self.where)

    def type_of(self, value: Value) -> TensorType:
        """Type for the example's sizes."""
        return self.types[value.name]

    # -- sizes --------------------------------------------------------------------------------------------------

    def dim(self, size: Any) -> Dim:
        """A size as an integer or as an expression of our symbols."""
        if isinstance(size, int):
            return size
        if isinstance(size, str):
            return size
        expression = size.node.expr if hasattr(size, "node") else size
        if isinstance(expression, sympy.Integer):
            return int(expression)
        return self._text(expression)

    def _text(self, e: Any) -> str:
        if isinstance(e, sympy.Integer):
            return str(int(e))
        if isinstance(e, sympy.Symbol):
            return self.rename[str(e)]
        if isinstance(e, sympy.Add):
            return "(" + " + ".join(self._text(a) for a in e.args) + ")"
        if isinstance(e, sympy.Mul):
            return "(" + " * ".join(self._text(a) for a in e.args) + ")"
        if isinstance(e, FloorDiv):
            return "(" + " // ".join(self._text(a) for a in e.args) + ")"
        if isinstance(e, Mod | PythonMod):
            return "(" + " % ".join(self._text(a) for a in e.args) + ")"
        raise LowerError(f"size {e} has no form in a program", site=self.site, hint=self.where)

    def dims(self, sizes: Any) -> list[Dim]:
        """Several sizes."""
        return [self.dim(s) for s in sizes]

    # -- layout -------------------------------------------------------------------------------------------------

    def channels_last(self, x: Value) -> Value:
        """[N, C, *space] -> [N, *space, C]."""
        perm = [0, *range(2, x.rank), 1]
        y = self.emit("transpose", [x], perm=perm)
        return self.shaped(y, [x.shape[p] for p in perm])

    def channels_first(self, x: Value) -> Value:
        """[N, *space, C] -> [N, C, *space]."""
        perm = [0, x.rank - 1, *range(1, x.rank - 1)]
        y = self.emit("transpose", [x], perm=perm)
        return self.shaped(y, [x.shape[p] for p in perm])


def number(x: Tensor) -> float:
    """A 0-d float32 tensor as the Python float of the same value."""
    return float(x.float().reshape(()))


def argument(node_args: Any, kwargs: dict[str, Any], index: int, name: str, default: Any = None) -> Any:
    """A torch op's argument by position or name."""
    if index < len(node_args):
        return node_args[index]
    return kwargs.get(name, default)

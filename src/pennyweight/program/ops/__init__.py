"""The ops: each a type rule and a numpy reference, which is the definition; docs/numerics.md says it in words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from pennyweight.errors import VerifyError
from pennyweight.program.ir import Array, Constant, TensorType

Types = list[Any]  # TensorType, or None for an absent optional operand
Operands = list[Any]  # numpy arrays, Constants, or None
Attrs = dict[str, Any]


class Definition(NamedTuple):
    """One op.

    Attributes:
        infer: operand types and attributes to result types; raises VerifyError where they do not fit.
        run: operand arrays and attributes to result arrays.
        attrs: names of the attributes, all required.
        exact: whether every engine must give the same bits; otherwise float sums may be ordered differently.
        doc: the equation.
    """

    infer: Callable[[Types, Attrs], list[TensorType]]
    run: Callable[[Operands, Attrs], list[Array]]
    attrs: frozenset[str]
    exact: bool
    doc: str


definitions: dict[str, Definition] = {}


def define(kind: str, attrs: str = "", *, exact: bool = True) -> Callable[[type], type]:
    """Register a class with static methods `infer` and `run`; its docstring is the op's equation."""

    def wrap(cls: Any) -> type:
        definitions[kind] = Definition(cls.infer, cls.run, frozenset(attrs.split()), exact, cls.__doc__)
        return cls  # type: ignore[no-any-return]

    return wrap


def array(operand: Any) -> Array:
    """The data of an operand, as stored."""
    return operand.data if isinstance(operand, Constant) else operand


def real(operand: Any) -> Array:
    """The data of an f32, f16 or bf16 operand, as float32."""
    if isinstance(operand, Constant):
        if operand.dtype == "bf16":
            return (operand.data.astype(np.uint32) << 16).view(np.float32)
        return operand.data.astype(np.float32)
    if operand.dtype == np.uint16:  # no other dtype is held so
        return (operand.astype(np.uint32) << 16).view(np.float32)  # type: ignore[no-any-return]
    return operand.astype(np.float32, copy=False)  # type: ignore[no-any-return]


def halved(x: Array) -> Array:
    """float32 rounded to bf16, to nearest, ties to even; held as its 16 bits. A NaN stays one, and quiet."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(x), bits >> 16 | 0x40, rounded).astype(np.uint16)


def require(condition: bool, what: str) -> None:
    """Raise VerifyError unless `condition`."""
    if not condition:
        raise VerifyError(what)


def want(kind: Any, *dtypes: str) -> tuple[int, ...]:
    """Check an operand's dtype and return its shape."""
    if kind is None:
        raise VerifyError("a required operand is absent")
    if kind.dtype not in dtypes:  # (a sentence for `require` would be made each time)
        raise VerifyError(f"an operand is {kind.dtype}, wanted {' or '.join(dtypes)}")
    return kind.ints  # type: ignore[no-any-return]


def broadcast(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    """Numpy broadcasting of two shapes."""
    try:
        return tuple(np.broadcast_shapes(a, b))
    except ValueError:
        raise VerifyError(f"shapes {a} and {b} do not broadcast") from None


# Imported by name, not found by a scan: the runtime must start in milliseconds.
from pennyweight.program.ops import (  # noqa: E402
    decoding,
    elementwise,
    grouped,
    integer,
    levels,
    movement,
    normalize,
    packed,
    pooling,
    products,
    real_products,
    recurrent,
    shifts,
    signs,
)

__all__ = [
    "Definition",
    "array",
    "broadcast",
    "decoding",
    "define",
    "definitions",
    "elementwise",
    "grouped",
    "halved",
    "integer",
    "levels",
    "movement",
    "normalize",
    "packed",
    "pooling",
    "products",
    "real",
    "real_products",
    "recurrent",
    "require",
    "shifts",
    "signs",
    "want",
]

"""Programs: a list of ops in single-assignment form over typed, dense, row-major tensors.

Sizes may be symbols ("batch"), bound when a program is run; attributes that are sizes may be expressions of symbols
("12 * batch"). Images are channels-last: convolutions and pools see [N, *space, C].
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from pennyweight.errors import InputError, VerifyError

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]
else:
    Array = np.ndarray  # numpy.typing costs a millisecond of the runtime's start

Dim = int | str

# name -> (numpy dtype that holds it, bytes); bf16 is held as its 16 bits, u4 as two codes a byte
DTYPES: dict[str, tuple[str, int]] = {
    "f32": ("<f4", 4),
    "f16": ("<f2", 2),
    "bf16": ("<u2", 2),
    "u8": ("|u1", 1),
    "i8": ("|i1", 1),
    "u4": ("|u1", 1),
    "i32": ("<i4", 4),
    "i64": ("<i8", 8),
    "bool": ("|b1", 1),
    "i16": ("<i2", 2),  # weights of integer products, and tables of them
}


class Record:
    """Named fields, in order: equal where they are, shown by name, copied with changes by `replace`.

    What `dataclasses` would make at every import of this module, written once: three milliseconds of a start.
    """

    __slots__: tuple[str, ...] = ()

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return all(getattr(self, n) == getattr(other, n) for n in self.__slots__)

    def __hash__(self) -> int:
        return hash(tuple(getattr(self, n) for n in self.__slots__))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{n}={getattr(self, n)!r}' for n in self.__slots__)})"

    def __reduce__(self) -> Any:
        return _made, (type(self), {n: getattr(self, n) for n in self.__slots__})


R = TypeVar("R", bound=Record)


def _made(kind: type[R], fields: dict[str, Any]) -> R:
    return kind(**fields)


def replace(record: R, **changes: Any) -> R:
    """A copy with other values of some fields.

    Raises:
        TypeError: on a name that is no field.
    """
    return type(record)(**{**{n: getattr(record, n) for n in record.__slots__}, **changes})


class TensorType(Record):
    """Element type and shape of a value."""

    __slots__ = ("dtype", "shape")

    def __init__(self, dtype: str, shape: tuple[Dim, ...]) -> None:
        self.dtype, self.shape = dtype, shape

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]"

    @property
    def ints(self) -> tuple[int, ...]:
        """The shape, all sizes known.

        Raises:
            VerifyError: if a size is still a symbol.
        """
        if str in map(type, self.shape):
            raise VerifyError("a size is still a symbol", shapes=str(self))
        return self.shape  # type: ignore[return-value]


class Constant(Record):
    """A stored tensor: its element type (numpy has no bf16 and no u4) and its data."""

    __slots__ = ("dtype", "data")  # noqa: RUF023 (the order of the constructor)

    def __init__(self, dtype: str, data: Array) -> None:
        self.dtype, self.data = dtype, data

    @property
    def type(self) -> TensorType:
        """Its type."""
        return TensorType(self.dtype, tuple(self.data.shape))


class Op(Record):
    """One operation.

    Attributes:
        kind: name in the op registry.
        inputs: value names; "" where an optional operand is absent.
        outputs: value names, assigned here and nowhere else.
        attrs: plain JSON values.
        site: module path or call that it came from, for messages and reports.
    """

    __slots__ = ("kind", "inputs", "outputs", "attrs", "site")  # noqa: RUF023 (the order of the constructor)

    def __init__(
        self,
        kind: str,
        inputs: tuple[str, ...],
        outputs: tuple[str, ...],
        attrs: dict[str, Any] | None = None,
        site: str = "",
    ) -> None:
        self.kind, self.inputs, self.outputs = kind, inputs, outputs
        self.attrs: dict[str, Any] = {} if attrs is None else attrs
        self.site = site


class _Read(Record):
    """What the reader of a file leaves with a program.

    Attributes:
        made: gives its `meta`, where that is not there yet.
        places: of constants by name: the array that was read, and where it lies in memory.
    """

    __slots__ = ("made", "places")
    made: Callable[[], dict[str, Any]]
    places: dict[str, tuple[Array, int]]


class Program(_Read):
    """Inputs, constants, ops in order, outputs.

    Attributes:
        inputs: name to type; sizes may be symbols.
        outputs: value names, in the order of the result's leaves.
        ops: in order of execution.
        constants: by value name.
        symbols: the sizes of the example the program was made with.
        tree: nesting of the result: an index into `outputs`, a list, or a dict of those.
        meta: text about where it came from (recipe, journal, versions).
    """

    __slots__ = ("inputs", "outputs", "ops", "constants", "symbols", "tree", "meta")  # noqa: RUF023 (the order of the constructor)
    __hash__ = None  # type: ignore[assignment]  # it changes

    def __init__(
        self,
        inputs: dict[str, TensorType],
        outputs: list[str],
        ops: list[Op],
        constants: dict[str, Constant],
        symbols: dict[str, int] | None = None,
        tree: Any = 0,
        meta: dict[str, Any] | None = None,
    ) -> None:
        self.inputs, self.outputs, self.ops, self.constants = inputs, outputs, ops, constants
        self.symbols: dict[str, int] = {} if symbols is None else symbols
        self.tree = tree
        self.meta: dict[str, Any] = {} if meta is None else meta
        self.places = {}

    def __getattr__(self, name: str) -> Any:
        """`meta` when it is first asked for, if it was left to `tell_later`."""
        if name != "meta":
            raise AttributeError(f"a program has no {name!r}")
        self.meta = self.made()
        return self.meta

    def tell_later(self, made: Callable[[], dict[str, Any]]) -> None:
        """Let `meta` be made by `made` when it is first asked for: no op reads it."""
        self.made = made
        del self.meta

    def __iter__(self) -> Iterator[Op]:
        return iter(self.ops)

    def __str__(self) -> str:
        lines = [f"input {n}: {t}" for n, t in self.inputs.items()]
        for op in self.ops:
            attrs = "".join(f" {k}={v}" for k, v in op.attrs.items())
            lines.append(f"{', '.join(op.outputs)} = {op.kind}({', '.join(op.inputs)}){attrs}  # {op.site}")
        return "\n".join([*lines, f"output {', '.join(self.outputs)}"])

    @property
    def nbytes(self) -> int:
        """Bytes of all constants."""
        return sum(c.data.nbytes for c in self.constants.values())

    def bind(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
        """The symbols' values for inputs of these shapes.

        Raises:
            InputError: on a missing input, a wrong rank or size, or sizes that contradict each other.
        """
        bound: dict[str, int] = {}
        for name, kind in self.inputs.items():
            if name not in shapes:
                raise InputError(f"input {name!r} is missing", hint=f"Inputs: {', '.join(self.inputs)}.")
            shape = shapes[name]
            if len(shape) != len(kind.shape):
                raise InputError(f"input {name!r} has the wrong rank", shapes=f"{shape}, wanted {kind}")
            for got, want in zip(shape, kind.shape, strict=True):
                if isinstance(want, str):
                    if bound.setdefault(want, got) != got:
                        raise InputError(
                            f"size {want!r} is {bound[want]} in one place and {got} in another",
                            site=f"input {name}",
                            shapes=f"{shape}, wanted {kind}",
                        )
                elif got != want:
                    raise InputError(f"input {name!r} has the wrong shape", shapes=f"{shape}, wanted {kind}")
        return bound


_OPERATORS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


def evaluate(expression: Dim, symbols: Mapping[str, int]) -> int:
    """A size: an integer, or an expression of symbols with + - * // %.

    Raises:
        VerifyError: on anything else.

    >>> evaluate("12 * batch + 1", {"batch": 4})
    49
    """
    if isinstance(expression, int):
        return expression
    if expression in symbols:
        return symbols[expression]
    if len(expression) > 500:
        raise VerifyError("a size expression is over 500 characters long")
    try:
        return _walk(ast.parse(expression, mode="eval").body, symbols)
    except (SyntaxError, ZeroDivisionError, RecursionError, ValueError) as error:
        raise VerifyError(f"{expression!r} is not a size: {error}") from None


def _walk(node: ast.expr, symbols: Mapping[str, int]) -> int:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.Name) and node.id in symbols:
        return symbols[node.id]
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_walk(node.left, symbols), _walk(node.right, symbols))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_walk(node.operand, symbols)
    raise VerifyError(
        f"{ast.unparse(node)!r} is not a size", hint=f"Symbols: {', '.join(symbols) or 'none'}."
    )


SIZE_ATTRS = ("shape", "starts", "stops", "pads", "size", "kernel", "repeats")


def resolve(attrs: dict[str, Any], symbols: Mapping[str, int]) -> dict[str, Any]:
    """Attributes with every size expression evaluated; the same object where there is none."""
    out: dict[str, Any] | None = None
    for key in SIZE_ATTRS:
        if key not in attrs:
            continue
        value = attrs[key]
        if type(value) is str:
            found: Any = evaluate(value, symbols)
        elif type(value) is list and str in map(type, value):
            found = [evaluate(v, symbols) for v in value]
        else:
            continue
        out = {**attrs} if out is None else out
        out[key] = found
    return attrs if out is None else out


def numpy_dtype(dtype: str) -> np.dtype[Any]:
    """The numpy dtype that holds a program dtype."""
    return _HELD[dtype]


_HELD = {name: np.dtype(held) for name, (held, _) in DTYPES.items()}

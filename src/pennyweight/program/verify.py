"""Check that a program keeps its own rules, and find the type of every value."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pennyweight.errors import PennyweightError, VerifyError, nearest
from pennyweight.program.ir import DTYPES, Program, TensorType, evaluate, numpy_dtype, resolve
from pennyweight.program.ops import definitions


def infer(program: Program, symbols: Mapping[str, int] | None = None) -> dict[str, TensorType]:
    """Types of all values, with sizes bound (to those of the example, if no symbols are given).

    Raises:
        VerifyError: on an op whose operands do not fit, naming it.
    """
    bound = program.symbols if symbols is None else symbols
    types: dict[str, TensorType] = {n: c.type for n, c in program.constants.items()}
    for name, kind in program.inputs.items():
        types[name] = TensorType(kind.dtype, tuple(evaluate(d, bound) for d in kind.shape))
    for op in program.ops:
        operands = [types[n] if n else None for n in op.inputs]
        try:
            results = definitions[op.kind].infer(operands, resolve(op.attrs, bound))
        except (PennyweightError, KeyError, IndexError, TypeError, ValueError, ZeroDivisionError) as error:
            what = error.what if isinstance(error, PennyweightError) else f"{type(error).__name__}: {error}"
            raise VerifyError(
                f"op {op.kind} does not fit its operands: {what}",
                site=op.site,
                shapes=", ".join(str(t) for t in operands),
            ) from error
        if len(results) != len(op.outputs):
            raise VerifyError(f"op {op.kind} has {len(results)} results, not {len(op.outputs)}", site=op.site)
        types.update(zip(op.outputs, results, strict=True))
    return types


def verify(program: Program) -> dict[str, TensorType]:
    """Check single assignment, order, known ops, constants, outputs; then the types. Returns the types.

    Raises:
        VerifyError: on the first broken rule.
    """
    defined: set[str] = set()
    for name in [*program.inputs, *program.constants]:
        _define(name, defined, "input or constant")
    for kind in program.inputs.values():
        if kind.dtype not in DTYPES:
            raise VerifyError(f"dtype {kind.dtype!r} is unknown", hint=nearest(kind.dtype, DTYPES, "dtypes"))
    for name, constant in program.constants.items():
        if constant.dtype not in DTYPES or constant.data.dtype != numpy_dtype(constant.dtype):
            raise VerifyError(
                f"constant {name!r} does not hold {constant.dtype}", shapes=str(constant.data.dtype)
            )
    for op in program.ops:
        if op.kind not in definitions:
            raise VerifyError(
                f"op {op.kind!r} is unknown", site=op.site, hint=nearest(op.kind, definitions, "ops")
            )
        for name in op.inputs:
            if name and name not in defined:
                raise VerifyError(f"op {op.kind} reads {name!r} before it is defined", site=op.site)
        _check_attrs(op.kind, op.attrs, op.site)
        for name in op.outputs:
            _define(name, defined, f"result of {op.kind}")
    for name in program.outputs:
        if name not in defined:
            raise VerifyError(f"output {name!r} is not defined")
    _check_tree(program.tree, len(program.outputs))
    types = infer(program)
    _check_wide(program, types)
    return types


def _check_wide(program: Program, types: Mapping[str, TensorType]) -> None:
    """Numbers of 16 bits are weights of integer products, or tables of such, and nothing else."""
    wide = {name for name, kind in types.items() if kind.dtype == "i16"}
    if not wide:
        return
    places = [(f"op {op.kind}", n, i) for op in program.ops for i, n in enumerate(op.inputs)]
    places += [("the result", n, 0) for n in program.outputs]
    for what, name, place in places:
        if name in wide and (place != 1 or what not in ("op conv", "op linear", "op unpack")):
            raise VerifyError(f"{what} reads {name!r}, i16, which is for weights alone")
    if wide & set(program.inputs):
        raise VerifyError(f"input {min(wide & set(program.inputs))!r} is i16, which is for weights alone")


def _define(name: str, defined: set[str], what: str) -> None:
    if not isinstance(name, str) or not name:
        raise VerifyError(f"{what} without a name")
    if name in defined:
        raise VerifyError(f"value {name!r} is defined twice")
    defined.add(name)


def _check_attrs(kind: str, attrs: Mapping[str, Any], site: str) -> None:
    known = definitions[kind].attrs
    if attrs.keys() == known:
        return
    for key in attrs:
        if key not in known:
            raise VerifyError(
                f"op {kind} has no attribute {key!r}", site=site, hint=nearest(key, known, "attributes")
            )
    for key in known:
        if key not in attrs:
            raise VerifyError(f"op {kind} lacks attribute {key!r}", site=site)


def _check_tree(tree: Any, count: int) -> None:
    if isinstance(tree, dict):
        for value in tree.values():
            _check_tree(value, count)
    elif isinstance(tree, list):
        for value in tree:
            _check_tree(value, count)
    elif tree is not None and not (type(tree) is int and 0 <= tree < count):
        raise VerifyError(f"the result's tree names output {tree!r} of {count}")

"""Programs as strict JSON text and back. Structure is checked here, meaning by `verify`, ranges by `bounds`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from pennyweight.errors import VerifyError
from pennyweight.program.bounds import MAX_ELEMENTS, MAX_RANK
from pennyweight.program.ir import DTYPES, Array, Constant, Dim, Op, Program, TensorType

VERSION = 1
MAX_OPS = 200_000
MAX_NAME = 1_000
MAX_OPERANDS = 10_000
MAX_SYMBOLS = 16
MAX_DEPTH = 24
_KEYS = {"version", "inputs", "outputs", "tree", "symbols", "constants", "ops"}
_NON_FINITE = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}


def to_text(program: Program) -> str:
    """The JSON text of everything but the constants' data and `meta`.

    Raises:
        VerifyError: if an attribute is no plain value.
    """
    data = {
        "version": VERSION,
        "inputs": [[n, t.dtype, list(t.shape)] for n, t in program.inputs.items()],
        "outputs": list(program.outputs),
        "tree": program.tree,
        "symbols": program.symbols,
        "constants": {n: c.dtype for n, c in program.constants.items()},
        "ops": [[o.kind, list(o.inputs), list(o.outputs), o.attrs, o.site] for o in program.ops],
    }
    return dumps(data)


def dumps(value: Any) -> str:
    """Strict JSON: infinities and NaN, which JSON lacks, become `{"float": "inf"}`.

    Raises:
        VerifyError: if `value` holds what JSON cannot say.
    """
    try:
        return json.dumps(_encoded(value), separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise VerifyError(f"this has no JSON form: {error}") from error


def _encoded(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": repr(value)}
    if isinstance(value, Mapping):
        return {k: _encoded(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_encoded(v) for v in value]
    return value


def _object(pairs: list[tuple[str, Any]]) -> Any:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is there twice")
    if len(found) == 1 and type(found.get("float")) is str:
        return _NON_FINITE.get(found["float"], found)
    return found


def _refused(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")


_decoder = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_refused)


def loads(text: str, what: str, *, measured: bool = True) -> Any:
    """The inverse of `dumps`: strict, and never deeper than `MAX_DEPTH`.

    Args:
        text: the JSON.
        what: what it is, for messages.
        measured: look at how deep it is; off where the caller goes through all of it, and refuses what lies too deep.

    Raises:
        VerifyError: on anything that is not strict JSON.
    """
    try:
        value = _decoder.decode(text)
    except RecursionError:
        raise VerifyError(f"the {what} is nested too deeply") from None
    except ValueError as error:
        raise VerifyError(f"the {what} is not JSON: {str(error)[:200]}") from None
    if measured and _depth(value) > MAX_DEPTH:
        raise VerifyError(f"the {what} is nested deeper than {MAX_DEPTH} levels")
    return value


def _depth(value: Any) -> int:
    """Levels of nesting, found level by level: deep text must not become deep recursion."""
    level, depth = [value], 0
    while level:
        deeper: list[Any] = []
        for item in level:
            if type(item) is dict:
                deeper += [v for v in item.values() if type(v) in (dict, list)]
            elif type(item) is list:
                deeper += [v for v in item if type(v) in (dict, list)]
        level, depth = deeper, depth + 1
        if depth > MAX_DEPTH:
            break
    return depth


def from_text(text: str, arrays: Mapping[str, Array]) -> Program:
    """Rebuild a program around its constants.

    Args:
        text: from `to_text`.
        arrays: the constants' data by name, in the numpy dtype that holds them.

    Raises:
        VerifyError: on the first thing that is not what it must be.
    """
    data = loads(text, "program", measured=False)
    if type(data) is not dict:
        raise VerifyError("the program is no JSON object")
    if data.get("version") != VERSION:
        raise VerifyError(
            f"program version {repr(data.get('version'))[:40]} is unknown",
            hint=f"This is a reader of version {VERSION}; a newer pennyweight may read it.",
        )
    if set(data) != _KEYS:
        odd = sorted(set(data) ^ _KEYS)[0]
        raise VerifyError(f"the program {'lacks' if odd in _KEYS else 'has an unknown'} key {odd[:40]!r}")
    symbols = _symbols(data["symbols"])
    inputs = _inputs(data["inputs"], symbols)
    if _depth(data["tree"]) > MAX_DEPTH:
        raise VerifyError(f"the result's tree is nested deeper than {MAX_DEPTH} levels")
    ops = [_op(entry) for entry in _listed(data["ops"], "ops", MAX_OPS)]
    outputs = [_name(n, "output") for n in _listed(data["outputs"], "outputs", MAX_OPERANDS)]
    return Program(inputs, outputs, ops, _constants(data["constants"], arrays), symbols, data["tree"])


def _listed(value: Any, what: str, most: int) -> list[Any]:
    if type(value) is not list or len(value) > most:
        raise VerifyError(f"{what} is no list of at most {most} entries")
    return value


def _name(value: Any, what: str, *, empty: bool = False) -> str:
    """A name: printable text, so that it survives messages, terminals and C strings."""
    if type(value) is not str or len(value) > MAX_NAME or not value.isprintable() or not (value or empty):
        raise VerifyError(f"{what} {str(value)[:40]!r} is no name")
    return value


def _symbols(value: Any) -> dict[str, int]:
    if type(value) is not dict or len(value) > MAX_SYMBOLS:
        raise VerifyError(f"symbols is no object of at most {MAX_SYMBOLS} entries")
    for name, size in value.items():
        if not (name.isascii() and name.isidentifier() and len(name) <= MAX_NAME):
            raise VerifyError(f"symbol {name[:40]!r} is no identifier")
        if type(size) is not int or not 1 <= size <= MAX_ELEMENTS:
            raise VerifyError(f"symbol {name!r} has size {str(size)[:40]}")
    return value


def _inputs(value: Any, symbols: Mapping[str, int]) -> dict[str, TensorType]:
    inputs: dict[str, TensorType] = {}
    used: set[Dim] = set()
    for entry in _listed(value, "inputs", MAX_OPERANDS):
        if type(entry) is not list or len(entry) != 3:
            raise VerifyError("an input is not [name, dtype, shape]")
        name = _name(entry[0], "input")
        if name in inputs:
            raise VerifyError(f"value {name!r} is defined twice")
        shape = _listed(entry[2], f"the shape of input {name!r}", MAX_RANK)
        for size in shape:
            if not (
                size in symbols if type(size) is str else type(size) is int and 0 <= size <= MAX_ELEMENTS
            ):
                raise VerifyError(f"input {name!r} has a size {str(size)[:40]!r}")
        used.update(shape)
        if type(entry[1]) is not str or entry[1] not in DTYPES:
            raise VerifyError(f"dtype {str(entry[1])[:40]!r} of input {name!r} is unknown")
        inputs[name] = TensorType(entry[1], tuple(shape))
    if not used.issuperset(symbols):
        raise VerifyError(f"symbol {sorted(set(symbols) - used)[0]!r} is the size of no input")
    return inputs


def _op(entry: Any) -> Op:
    if type(entry) is not list or len(entry) != 5 or type(entry[3]) is not dict:
        raise VerifyError("an op is not [kind, inputs, outputs, attributes, site]")
    kind, inputs, outputs, attrs, site = entry
    if type(inputs) is list is type(outputs) and len(inputs) <= MAX_OPERANDS >= len(outputs):
        names = [kind, site, *inputs, *outputs, *attrs]
        if kind and all(outputs) and "" not in attrs and set(map(type, names)) == {str}:
            joined = "".join(names)
            if len(joined) <= MAX_NAME and joined.isprintable():  # so is each of them
                return Op(kind, tuple(inputs), tuple(outputs), attrs, site)
    _listed(inputs, f"operands of {kind}", MAX_OPERANDS)
    _listed(outputs, f"results of {kind}", MAX_OPERANDS)
    _name(kind, "op")
    _name(site, "site", empty=True)
    for name in inputs:
        _name(name, f"operand of {kind}", empty=True)
    for name in outputs:
        _name(name, f"result of {kind}")
    for key in attrs:
        _name(key, f"attribute of {kind}")
    return Op(kind, tuple(inputs), tuple(outputs), attrs, site)


def _constants(value: Any, arrays: Mapping[str, Array]) -> dict[str, Constant]:
    if type(value) is not dict:
        raise VerifyError("constants is no object")
    if set(value) != set(arrays):
        odd = sorted(set(value) ^ set(arrays))[0]
        where = "is stored but not named" if odd in arrays else "is named but not stored"
        raise VerifyError(f"constant {odd[:40]!r} {where}")
    joined = "".join(value)
    plain = joined.isprintable() and "" not in value and max(map(len, value), default=0) <= MAX_NAME
    for name, dtype in value.items():
        if not plain:
            _name(name, "constant")
        if type(dtype) is not str or dtype not in DTYPES:
            raise VerifyError(f"dtype {str(dtype)[:40]!r} of constant {name!r} is unknown")
    return {name: Constant(dtype, arrays[name]) for name, dtype in value.items()}

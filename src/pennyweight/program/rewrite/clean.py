"""Constant folding, common subexpressions, dead code."""

from __future__ import annotations

import json

import numpy as np

from pennyweight.program.ir import Constant, Op, Program, replace, resolve
from pennyweight.program.ops import definitions
from pennyweight.program.rewrite.graph import rebuilt

# folding these would store more than it saves
STAYS = frozenset({"decode", "decode_levels", "unpack", "embedding", "iota", "full"})
SMALL = 4096


def fold_constants(program: Program) -> Program:
    """Compute ops whose operands are all constants, where the result is not larger than the operands (or small)."""
    constants = dict(program.constants)
    ops: list[Op] = []
    for op in program.ops:
        named = [n for n in op.inputs if n]
        symbolic = any(isinstance(v, str) for a in op.attrs.values() if isinstance(a, list) for v in a)
        foldable = named and all(n in constants for n in named) and op.kind not in STAYS and not symbolic
        if foldable and all(constants[n].dtype not in ("u4", "bf16", "f16") for n in named):
            operands = [constants[n] if n else None for n in op.inputs]
            results = definitions[op.kind].run(operands, resolve(op.attrs, program.symbols))
            size = sum(constants[n].data.nbytes for n in named)
            if sum(r.nbytes for r in results) <= max(size, SMALL):
                names = {
                    "float32": "f32",
                    "int64": "i64",
                    "int32": "i32",
                    "uint8": "u8",
                    "int8": "i8",
                    "int16": "i16",
                    "bool": "bool",
                    "uint16": "bf16",
                }
                for name, result in zip(op.outputs, results, strict=True):
                    constants[name] = Constant(
                        names[str(result.dtype)], np.ascontiguousarray(result).reshape(result.shape)
                    )
                continue
        ops.append(op)
    return replace(program, ops=ops, constants=constants)


def join_equal(program: Program) -> Program:
    """One op for all that compute the same from the same."""
    seen: dict[tuple[object, ...], tuple[str, ...]] = {}
    alias: dict[str, str] = {}
    ops: list[Op] = []
    for op in program.ops:
        inputs = tuple(alias.get(n, n) for n in op.inputs)
        key = (op.kind, inputs, json.dumps(op.attrs, sort_keys=True))
        if key in seen:
            alias.update(zip(op.outputs, seen[key], strict=True))
            continue
        seen[key] = op.outputs
        ops.append(replace(op, inputs=inputs))
    return rebuilt(program, ops, alias)


def drop_dead(program: Program) -> Program:
    """Remove ops and constants that no output needs."""
    needed = set(program.outputs)
    ops: list[Op] = []
    for op in reversed(program.ops):
        if any(n in needed for n in op.outputs):
            needed.update(n for n in op.inputs if n)
            ops.append(op)
    constants = {n: c for n, c in program.constants.items() if n in needed}
    return replace(program, ops=ops[::-1], constants=constants)

"""Push rounding up through ops that only move or clip values: rounding before equals rounding after, exactly."""

from __future__ import annotations

from typing import Any

import numpy as np

from pennyweight.program.ir import Op, Program, replace
from pennyweight.program.rewrite.graph import Names, View, rebuilt

MOVES = frozenset(
    {"reshape", "transpose", "slice", "concat", "expand", "upsample", "max_pool", "pad", "stuff", "gather"}
)
FREE = frozenset({"reshape"})


def code_of(value: float, attrs: dict[str, Any]) -> int:
    """The code a quantize op gives a number."""
    r = np.float32(1) / np.float32(attrs["scale"])
    with np.errstate(over="ignore"):
        t = np.rint(np.float32(value) * r) + np.float32(attrs["zero"])
    return int(np.fmin(np.fmax(t, np.float32(attrs["lo"])), np.float32(attrs["hi"])))


def push_quantize(program: Program) -> Program:
    """One step up for every quantize that can go."""
    view = View(program)
    ops: list[Op] = []
    alias: dict[str, str] = {}
    names = Names(program)
    for op in program.ops:
        maker = view.maker.get(op.inputs[0]) if op.kind == "quantize" else None
        if maker is None:
            ops.append(op)
            continue
        if maker.kind == "unary" and maker.attrs["fn"] == "clip":
            attrs = dict(op.attrs)
            attrs["lo"], attrs["hi"] = (
                code_of(maker.attrs["p"], op.attrs),
                code_of(maker.attrs["q"], op.attrs),
            )
            ops.append(replace(op, inputs=maker.inputs, attrs=attrs))
            continue
        others = [r for r in view.readers[maker.outputs[0]] if r.kind != "quantize"]
        movable = maker.kind in MOVES and (maker.kind in FREE or not others)
        if not movable or maker.outputs[0] in program.outputs:
            ops.append(op)
            continue
        operands = maker.inputs if maker.kind == "concat" else maker.inputs[:1]
        codes: list[str] = []
        for name in operands:
            out = names("codes")
            ops.append(Op("quantize", (name,), (out,), op.attrs, op.site))
            codes.append(out)
        attrs = dict(maker.attrs)
        if "value" in attrs:
            attrs["value"] = code_of(attrs["value"], op.attrs)
        rest = () if maker.kind == "concat" else maker.inputs[1:]
        ops.append(Op(maker.kind, (*codes, *rest), op.outputs, attrs, maker.site))
    return rebuilt(program, ops, alias)

"""Take constants that follow a float product into its weights and bias: batch norms, scales, shifts."""

from __future__ import annotations

from typing import Any

import numpy as np

from pennyweight.program.ir import Array, Op, Program, replace
from pennyweight.program.rewrite.graph import View, add_constant, rebuilt

PRODUCTS = ("conv_f32", "linear_f32")
F32, F64 = np.float32, np.float64


def fold_scales(program: Program) -> Program:
    """`(x w^T + b) * g + s`, g and s constant along all axes but the last, is `x (g w)^T + (g b + s)`.

    The products `g w` and `g b + s` are taken in binary64 and rounded once. Weights that are no f32 constants (stored
    codes, halves) stay as they are; so does everything between the two that has another reader.
    """
    while True:
        folded = _once(program)
        if folded is None:
            return program
        program = folded


def _once(program: Program) -> Program | None:
    program = replace(program, constants=dict(program.constants))
    view = View(program)
    ops: list[Op] = []
    alias: dict[str, str] = {}
    done: set[str] = set()  # products that have changed, to be read again before they change more
    where: dict[str, int] = {}
    for op in program.ops:
        product = _product(view, op)
        if product is not None and product.outputs[0] not in done:
            new = _taken(program, view, product, op)
            if new is not None:
                ops[where[product.outputs[0]]] = new
                alias[op.outputs[0]] = product.outputs[0]
                done.add(product.outputs[0])
                continue
        where.update(dict.fromkeys(op.outputs, len(ops)))
        ops.append(op)
    return rebuilt(program, ops, alias) if done else None


def _product(view: View, op: Op) -> Op | None:
    """The product whose result a sum or product with a constant alone reads."""
    if op.kind != "binary" or op.attrs["fn"] not in ("mul", "add"):
        return None
    for name in op.inputs:
        found = view.made_by(name, *PRODUCTS)
        if found is not None and view.uses(name) == 1:
            return found
    return None


def _taken(program: Program, view: View, product: Op, op: Op) -> Op | None:
    other = op.inputs[1] if op.inputs[0] == product.outputs[0] else op.inputs[0]
    constant, weight = view.array(other), view.array(product.inputs[1])
    rank, n = len(view.types[product.outputs[0]].shape), view.types[product.inputs[1]].ints[0]
    if constant is None or weight is None or constant.ndim > rank or constant.size not in (1, n):
        return None
    if constant.size > 1 and constant.shape[-1] != n:
        return None
    values = np.broadcast_to(constant.reshape(-1), (n,)).astype(F64)
    stored = product.inputs[2] if len(product.inputs) > 2 else ""
    bias: Any = view.array(stored) if stored else np.zeros(n, F32)
    if bias is None or not np.isfinite(values).all():
        return None
    inputs = list(product.inputs[:2])
    if op.attrs["fn"] == "mul":
        scaled: Array = (weight * values.reshape(-1, *[1] * (weight.ndim - 1))).astype(F32)
        inputs[1] = add_constant(program, f"{product.inputs[1]}~", scaled)
        bias = bias * values
    else:
        bias = bias + values
    zero = not stored and op.attrs["fn"] == "mul"
    last = "" if zero else add_constant(program, f"{product.site}.bias~", bias.astype(F32))
    return replace(product, inputs=(*inputs, last))

"""Constants stored small that kernels want wide: computed once, when the program is loaded."""

from __future__ import annotations

from dataclasses import replace

from pennyweight.program.ir import Constant, Op, Program
from pennyweight.program.ops import definitions, real


def widened(program: Program) -> Program:
    """The program with stored tensors as the engine wants them; the file stays small, values are the same.

    Casts of stored f16 and bf16 tensors to f32 are replaced by their results, and so is the unpacking of codes of a few
    bits for all but linear layers, which read them packed where they have few rows.
    """
    ops: list[Op] = []
    constants = dict(program.constants)
    elsewhere = {n for op in program.ops for i, n in enumerate(op.inputs) if op.kind != "linear" or i != 1}
    for op in program.ops:
        source = program.constants.get(op.inputs[0]) if op.kind in ("cast", "unpack") else None
        if source is None or op.outputs[0] in program.outputs:
            ops.append(op)
        elif op.kind == "unpack" and op.outputs[0] in elsewhere and op.inputs[1] in program.constants:
            (codes,) = definitions["unpack"].run([source, program.constants[op.inputs[1]]], op.attrs)
            constants[op.outputs[0]] = Constant("i8", codes)
        elif op.kind == "cast" and source.dtype in ("f16", "bf16") and op.attrs["dtype"] == "f32":
            constants[op.outputs[0]] = Constant("f32", real(source))
        else:
            ops.append(op)
    return program if len(ops) == len(program.ops) else replace(program, ops=ops, constants=constants)

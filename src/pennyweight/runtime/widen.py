"""Constants stored in 16 bits that a program casts to float32: cast once, when the program is loaded."""

from __future__ import annotations

from dataclasses import replace

from pennyweight.program.ir import Constant, Op, Program
from pennyweight.program.ops import real


def widened(program: Program) -> Program:
    """The program with every cast of a stored f16 or bf16 tensor to f32 replaced by the result.

    The file stays small; the engine packs scales when it plans and wants them as constants. Values are the same.
    """
    ops: list[Op] = []
    constants = dict(program.constants)
    for op in program.ops:
        source = program.constants.get(op.inputs[0]) if op.kind == "cast" else None
        half = source is not None and source.dtype in ("f16", "bf16") and op.attrs["dtype"] == "f32"
        if source is None or not half or op.outputs[0] in program.outputs:
            ops.append(op)
        else:
            constants[op.outputs[0]] = Constant("f32", real(source))
    return program if len(ops) == len(program.ops) else replace(program, ops=ops, constants=constants)

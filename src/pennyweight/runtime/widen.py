"""Constants stored small that kernels want wide: computed once, when the program is loaded."""

from __future__ import annotations

from pennyweight.errors import KernelError
from pennyweight.program.ir import Constant, Op, Program, replace
from pennyweight.program.ops import definitions, real
from pennyweight.program.ops.levels import decoded_levels

_WIDENING = frozenset({"cast", "unpack", "decode_levels"})
_READ_STORED = frozenset({"linear", "linear_f32", "conv_f32"})


def widened(program: Program) -> Program:
    """The program with stored tensors as the engine wants them; the file stays small, values are the same.

    Casts of stored f16 and bf16 tensors to f32 and `decode_levels` are replaced by their results, so is the unpacking
    of codes of a few bits: for all but linear layers (and float convolutions, of levels), which read them as they are
    stored where they have few rows and levels of a byte.
    """
    if not any(op.kind in _WIDENING for op in program.ops):
        return program
    ops: list[Op] = []
    constants = dict(program.constants)
    elsewhere = {
        n for op in program.ops for i, n in enumerate(op.inputs) if op.kind not in _READ_STORED or i != 1
    } | set(program.outputs)
    renamed: dict[str, str] = {}
    for op in program.ops:
        if op.outputs[0] not in elsewhere and _half(program, op):
            renamed[op.outputs[0]] = op.inputs[0]  # a product reads 16 bits as they are
            continue
        value = _decoded(program, constants, op, elsewhere)
        if value is None:
            names = tuple(renamed.get(n, n) for n in op.inputs)
            ops.append(op if names == op.inputs else replace(op, inputs=names))
        else:
            constants[op.outputs[0]] = value
    if len(ops) == len(program.ops):
        return program
    read = {n for op in ops for n in op.inputs} | set(program.outputs)
    return replace(program, ops=ops, constants={n: c for n, c in constants.items() if n in read})


def _decoded(
    program: Program, constants: dict[str, Constant], op: Op, elsewhere: set[str]
) -> Constant | None:
    found = [constants.get(n) for n in op.inputs]  # scales may have been decoded just before
    if op.kind not in _WIDENING or any(c is None for c in found):
        return None
    source = found[0]
    assert source is not None
    if any(isinstance(n, str) for n in op.attrs.get("shape", [])):
        raise KernelError(
            f"{op.kind} of stored values has a shape that depends on the inputs",
            site=op.site,
            shapes=str(op.attrs["shape"]),
            hint="The reference backend runs it.",
        )
    if op.kind == "decode_levels":
        if op.outputs[0] not in elsewhere:
            return None
        return Constant("f32", decoded_levels(source, found[1], found[2], op.attrs))
    if op.outputs[0] in program.outputs:
        return None
    if op.kind == "unpack":
        table = found[1]
        assert table is not None
        if op.outputs[0] not in elsewhere and table.dtype == "i8":
            return None
        (codes,) = definitions["unpack"].run(found, op.attrs)
        return Constant(table.dtype, codes)
    return Constant("f32", real(source)) if _half(program, op) else None


def _half(program: Program, op: Op) -> bool:
    """Whether an op widens a stored tensor of 16 bits."""
    source = program.constants.get(op.inputs[0]) if op.kind == "cast" else None
    return source is not None and source.dtype in ("f16", "bf16") and op.attrs["dtype"] == "f32"

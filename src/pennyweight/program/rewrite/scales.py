"""Tables of scales that hold few different numbers are stored as bytes, or half bytes, and a table of those numbers."""

from __future__ import annotations

import numpy as np

from pennyweight.program.ir import Array, Constant, Op, Program, replace
from pennyweight.program.rewrite.graph import Names

# op -> positions of operands f32 (or f16) [rows, groups]: scales and zero points of weights
_SCALES: dict[str, tuple[int, ...]] = {
    "linear_w": (2, 3), "embedding": (2, 3), "linear_grouped": (2,), "decode": (1, 2), "decode_levels": (2,),
}  # fmt: skip
_POWERS = np.append(np.ldexp(1.0, np.arange(255) - 127), 0.0).astype(
    np.float32
)  # of e8m0; its last is no number


def small_scales(program: Program) -> Program:
    """Shared exponents (MX), scales that were quantized themselves and whole zero points, stored as what they are.

    A table of at most 16 different numbers takes half a byte each, one of at most 256 a byte, powers of two by their
    exponents, so that all layers share their numbers. Values are the same, bit for bit; the engine decodes them once,
    when a program is loaded. Tables that would not shrink by a quarter stay.
    """
    name, constants = Names(program), dict(program.constants)
    ops: list[Op] = []
    made: dict[str, str] = {}
    shared: dict[bytes, str] = {}

    def stored(hint: str, dtype: str, data: Array) -> str:
        """A constant, one for equal contents."""
        key = dtype.encode() + str(data.shape).encode() + data.tobytes()
        if key not in shared:
            shared[key] = name(hint)
            constants[shared[key]] = Constant(dtype, data)
        return shared[key]

    for op in program.ops:
        inputs = list(op.inputs)
        for place in _SCALES.get(op.kind, ()):
            source = inputs[place] if place < len(inputs) else ""
            if source not in program.constants:
                continue
            if source not in made:
                parts = _parts(program.constants[source])
                made[source] = source if parts is None else name(source)
                if parts is not None:
                    bits, codes, levels = parts
                    one = stored("one", "f32", np.ones((1, 1), np.float32))
                    packed = stored(f"{source}.codes", "u4" if bits == 4 else "u8", codes)
                    attrs = {"bits": bits, "shape": list(program.constants[source].data.shape)}
                    operands = (packed, stored(f"{source}.levels", "f32", levels), one)
                    ops.append(Op("decode_levels", operands, (made[source],), attrs, op.site))
            inputs[place] = made[source]
        ops.append(op if tuple(inputs) == op.inputs else replace(op, inputs=tuple(inputs)))
    return replace(program, ops=ops, constants=constants)


def _parts(scale: Constant) -> tuple[int, Array, Array] | None:
    """Bits of a code, codes (of 4 bits two a byte, low nibble first) and levels; None where they save too little."""
    if scale.dtype not in ("f32", "f16") or scale.data.ndim != 2 or scale.data.size < 128:
        return None
    data = np.ascontiguousarray(scale.data, np.float32)
    patterns, places = np.unique(data.view(np.uint32), return_inverse=True)
    codes: Array = places.reshape(data.shape).astype(np.uint8)
    numbers: Array = patterns.view(np.float32)
    levels: Array = np.zeros(16 if len(patterns) <= 16 else 256, np.float32)
    if len(patterns) <= 16:
        levels[: len(numbers)] = numbers
        padded = np.pad(codes, ((0, 0), (0, codes.shape[1] % 2)))
        bits, codes = 4, padded[:, ::2] | padded[:, 1::2] << 4
    elif len(patterns) <= 256:
        bits = 8
        levels[: len(numbers)] = numbers
        where = np.searchsorted(_POWERS[:255], data)
        if (where < 255).all() and (_POWERS[where].view(np.uint32) == data.view(np.uint32)).all():
            codes, levels = where.astype(np.uint8), _POWERS
    else:
        return None
    table = 0 if levels is _POWERS else levels.nbytes
    return (
        (bits, np.ascontiguousarray(codes), levels)
        if codes.nbytes + table <= 0.75 * scale.data.nbytes
        else None
    )

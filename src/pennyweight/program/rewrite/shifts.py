"""Multipliers that are powers of two become shifts: programs of dynamic fixed point multiply nothing but codes."""

from __future__ import annotations

from typing import Any

import numpy as np

from pennyweight.program.ir import Op, Program, replace
from pennyweight.program.ops.shifts import GREATEST, LEAST


def by_shifts(program: Program) -> Program:
    """`requant` and `requant_add` whose multipliers are one power of two, as their forms in integers.

    The results are the same wherever float32 holds the accumulator exactly (24 bits); beyond, shifting is exact and
    the product was rounded twice.
    """
    ops: list[Op] = []
    for op in program.ops:
        new = None
        if op.kind in ("requant", "requant_add"):
            stored = program.constants.get(op.inputs[1])
            shift = None if stored is None else shift_of(stored.data)
            if shift is not None and op.kind == "requant":
                new = replace(
                    op, kind="requant_shift", inputs=op.inputs[:1], attrs={"shift": shift, **op.attrs}
                )
            elif shift is not None:
                attrs = dict(op.attrs)
                r_shift = shift_of(np.asarray([attrs.pop("r_multiplier")]))
                if r_shift is not None:
                    attrs |= {"shift": shift, "r_shift": r_shift}
                    new = replace(
                        op, kind="requant_add_shift", inputs=(op.inputs[0], op.inputs[2]), attrs=attrs
                    )
        ops.append(op if new is None else new)
    return replace(program, ops=ops)


def shift_of(multipliers: Any) -> int | None:
    """`s` where all multipliers are `2^-s` and a program can say so, else None.

    >>> shift_of(np.float32([0.25, 0.25])), shift_of(np.float32([0.25, 0.5])), shift_of(np.float32([0.3]))
    (2, None, None)
    """
    found = np.unique(np.asarray(multipliers, np.float64))
    if len(found) != 1:
        return None
    fraction, exponent = np.frexp(found[0])
    shift = 1 - int(exponent)
    return shift if fraction == 0.5 and LEAST <= shift <= GREATEST else None

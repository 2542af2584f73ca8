"""Rewriting programs: float arithmetic between codes becomes integer ops. Each rule is a function of a program.

`optimize` runs them in order; the caller verifies before and after. After it, the program is the law: the interpreter
and every engine compute exactly what it says.
"""

from __future__ import annotations

from pennyweight.program.ir import Program
from pennyweight.program.rewrite.clean import drop_dead, fold_constants, join_equal
from pennyweight.program.rewrite.compose import compose
from pennyweight.program.rewrite.fold import fold_scales
from pennyweight.program.rewrite.fuse import fuse
from pennyweight.program.rewrite.layout import sink_transposes
from pennyweight.program.rewrite.narrow import narrow
from pennyweight.program.rewrite.push import push_quantize
from pennyweight.program.rewrite.scales import small_scales
from pennyweight.program.rewrite.shifts import by_shifts
from pennyweight.program.rewrite.signs import lower_signs


def optimize(program: Program) -> Program:
    """All rules, until nothing changes."""
    program = drop_dead(fold_constants(program))
    program = drop_dead(fold_constants(sink_transposes(program)))
    program = drop_dead(fold_scales(program))
    program = drop_dead(compose(join_equal(program)))
    while True:
        before = [(op.kind, op.inputs, op.outputs) for op in program.ops]
        program = drop_dead(join_equal(program))
        program = drop_dead(push_quantize(program))
        program = drop_dead(fuse(join_equal(program)))
        program = drop_dead(narrow(join_equal(program)))
        program = drop_dead(lower_signs(program))
        if before == [(op.kind, op.inputs, op.outputs) for op in program.ops]:
            return drop_dead(small_scales(by_shifts(program)))


__all__ = ["optimize"]

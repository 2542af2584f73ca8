"""Products of bf16 numbers, and bf16 from one product to the next.

Lowering a layer that rounds its operands to bf16 gives `f(widen(round(x)), widen(w))`. Here the product takes the 16
bits themselves, and what it rounded is what everybody else reads: a value is kept in memory once, in half the bytes.
"""

from __future__ import annotations

from pennyweight.program.ir import Op, Program, replace
from pennyweight.program.rewrite.graph import Names, View, rebuilt

MOVES = frozenset({"reshape", "transpose", "slice", "concat", "expand", "upsample", "max_pool"})


def narrow(program: Program) -> Program:
    """One step of each rule, where a program rounds to bf16 at all."""
    if not any(op.kind == "cast" and op.attrs["dtype"] == "bf16" for op in program.ops):
        return program
    return _push(_sink(_share(_multiply(program))))


def _rounds(op: Op | None) -> bool:
    return op is not None and op.kind == "cast" and op.attrs["dtype"] == "bf16"


def _multiply(program: Program) -> Program:
    """`product(widen(a), widen(b))` is `product(a, b)`: the numbers are the same."""
    view = View(program)

    def half(name: str) -> str:
        """The bf16 value that an f32 one is widened from, or ""."""
        if view.types[name].dtype == "bf16":
            return name
        source = view.made_by(name, "cast")
        return source.inputs[0] if source is not None and view.types[source.inputs[0]].dtype == "bf16" else ""

    ops: list[Op] = []
    for op in program.ops:
        if op.kind in ("conv_f32", "linear_f32", "matmul_f32"):
            a, b = half(op.inputs[0]), half(op.inputs[1])
            if a and b and (a, b) != op.inputs[:2]:
                op = replace(op, inputs=(a, b, *op.inputs[2:]))
        ops.append(op)
    return replace(program, ops=ops)


def _share(program: Program) -> Program:
    """Who else reads a value that a product rounds reads it rounded too: it need not be kept in f32."""
    view, name = View(program), Names(program)
    ops: list[Op] = []
    moved: set[str] = set()  # results of casts that were made where their operand is
    instead: dict[str, str] = {}
    for op in program.ops:
        if op.outputs[0] in moved:
            continue
        if not _rounds(op):
            op = replace(op, inputs=tuple(instead.get(n, n) for n in op.inputs))
        ops.append(op)
        for value in op.outputs:
            readers = view.readers.get(value, [])
            rounding = next((r for r in readers if _rounds(r)), None)
            if rounding is None or all(_rounds(r) for r in readers):
                continue
            widened = name("cast")
            ops += [rounding, Op("cast", rounding.outputs, (widened,), {"dtype": "f32"}, rounding.site)]
            moved.add(rounding.outputs[0])
            instead[value] = widened
    return replace(program, ops=ops)


def _sink(program: Program) -> Program:
    """Moving widened numbers is widening moved ones."""
    view, name = View(program), Names(program)
    ops: list[Op] = []
    for op in program.ops:
        count = len(op.inputs) if op.kind == "concat" else 1
        sources = [view.made_by(n, "cast") for n in op.inputs[:count]] if op.kind in MOVES else []
        halves = [s.inputs[0] for s in sources if s is not None and view.types[s.inputs[0]].dtype == "bf16"]
        if not sources or len(halves) < count:
            ops.append(op)
            continue
        moved = name("cast")
        ops.append(replace(op, inputs=(*halves, *op.inputs[count:]), outputs=(moved,)))
        ops.append(Op("cast", (moved,), op.outputs, {"dtype": "f32"}, op.site))
    return replace(program, ops=ops)


def _push(program: Program) -> Program:
    """Rounding before a move, or before the greatest is taken, is rounding after it."""
    view, name = View(program), Names(program)
    ops: list[Op] = []
    alias: dict[str, str] = {}
    for op in program.ops:
        maker = view.maker.get(op.inputs[0]) if _rounds(op) else None
        if maker is not None and maker.kind == "cast" and view.types[maker.inputs[0]].dtype == "bf16":
            alias[op.outputs[0]] = maker.inputs[0]
        elif maker is not None and maker.kind in MOVES and view.uses(maker.outputs[0]) == 1:
            operands = maker.inputs if maker.kind == "concat" else maker.inputs[:1]
            halves = tuple(name("cast") for _ in operands)
            ops += [Op("cast", (x,), (h,), op.attrs, op.site) for x, h in zip(operands, halves, strict=True)]
            ops.append(replace(maker, inputs=halves, outputs=op.outputs))
        else:
            ops.append(op)
    return rebuilt(program, ops, alias)

"""What networks write out in elementary ops and the program has one op for: RMS norms, rotary embeddings."""

from __future__ import annotations

from pennyweight.program.ir import Op, Program
from pennyweight.program.rewrite.graph import View, rebuilt


def compose(program: Program) -> Program:
    """The same program, the same bits; what the ops that went had made for others too stays."""
    view = View(program)
    ops = [_rotary(view, op) or _rms_norm(view, op) or op for op in program.ops]
    gained = View(rebuilt(program, ops, {}))
    return rebuilt(program, [_gained(gained, op) or op for op in gained.program.ops], {})


def _binary(view: View, name: str, fn: str) -> Op | None:
    op = view.made_by(name, "binary")
    return op if op is not None and op.attrs["fn"] == fn else None


def _unary(view: View, name: str, fn: str) -> Op | None:
    op = view.made_by(name, "unary")
    return op if op is not None and op.attrs["fn"] == fn else None


def _rms_norm(view: View, op: Op) -> Op | None:
    """`x * rsqrt(mean(x^2) + eps)`."""
    if op.kind != "binary" or op.attrs["fn"] != "mul":
        return None
    for x, factor in (op.inputs, op.inputs[::-1]):
        root = _unary(view, factor, "rsqrt")
        plus = _unary(view, root.inputs[0], "add") if root else None
        mean = view.made_by(plus.inputs[0], "reduce") if plus else None
        square = _unary(view, mean.inputs[0], "square") if mean else None
        if plus is None or mean is None or square is None or square.inputs[0] != x:
            continue
        last = len(view.types[x].shape) - 1
        if mean.attrs == {"fn": "mean", "axes": [last], "keepdims": True} and plus.attrs["p"] >= 0:
            return Op("rms_norm", (x,), op.outputs, {"eps": float(plus.attrs["p"])}, op.site)
    return None


def _gained(view: View, op: Op) -> Op | None:
    """An RMS norm times a gain that only differs along the last axis."""
    if op.kind != "binary" or op.attrs["fn"] != "mul":
        return None
    for normed, gain in (op.inputs, op.inputs[::-1]):
        norm = view.made_by(normed, "rms_norm")
        if norm is None or len(norm.inputs) > 1 or gain not in view.program.constants:
            continue
        if view.types[gain].shape == view.types[normed].shape[-1:] and view.types[gain].dtype == "f32":
            return Op("rms_norm", (norm.inputs[0], gain), op.outputs, norm.attrs, norm.site)
    return None


def _rotary(view: View, op: Op) -> Op | None:
    """`x * cos + concat(-x[h:], x[:h]) * sin`."""
    if op.kind != "binary" or op.attrs["fn"] != "add":
        return None
    left, right = (_binary(view, n, "mul") for n in op.inputs)
    if left is None or right is None:
        return None
    for straight, crossed in ((left, right), (right, left)):
        for x, cos in (straight.inputs, straight.inputs[::-1]):
            for halves, sin in (crossed.inputs, crossed.inputs[::-1]):
                if _turned(view, halves, x) and _fits(view, x, cos) and _fits(view, x, sin):
                    return Op("rotary", (x, cos, sin), op.outputs, {}, op.site)
    return None


def _fits(view: View, x: str, turn: str) -> bool:
    """Whether cos or sin has all sizes that broadcasting must not add to x."""
    a, b = view.types[x].shape, view.types[turn].shape
    return (
        len(b) <= len(a)
        and b[-1:] == a[-1:]
        and all(n in (1, m) for n, m in zip(b[::-1], a[::-1], strict=False))
    )


def _turned(view: View, name: str, x: str) -> bool:
    """Whether a value is `concat(-x[h:], x[:h])` along the last axis."""
    joined = view.made_by(name, "concat")
    last = len(view.types[x].shape) - 1
    if joined is None or joined.attrs["axis"] != last or len(joined.inputs) != 2:
        return False
    minus = _unary(view, joined.inputs[0], "neg")
    half = view.types[x].ints[last] // 2
    return minus is not None and _part(view, minus.inputs[0], x, half) and _part(view, joined.inputs[1], x, 0)


def _part(view: View, name: str, x: str, start: int) -> bool:
    """Whether a value is one half of x along the last axis, from `start` on."""
    cut = view.made_by(name, "slice")
    if cut is None or cut.inputs[0] != x:
        return False
    shape, last = view.types[x].ints, len(view.types[x].ints) - 1
    return (
        view.fixed(x, [last])
        and shape[last] % 2 == 0
        and cut.attrs["starts"] == [0] * last + [start]
        and cut.attrs["steps"] == [1] * (last + 1)
        and view.types[name].ints == (*shape[:last], shape[last] // 2)
    )

"""Lowering of recurrent layers that compute in float: step by step, so their length is fixed in the program."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pennyweight.errors import LowerError
from pennyweight.program.ir import Dim
from pennyweight.program.lower.activations import binary, unary
from pennyweight.program.lower.builder import Builder, Value, handles

States = tuple[Value, ...]


@dataclass(frozen=True, slots=True)
class _Layer:
    """Weights of one layer and direction, and the sizes of its states: `rows` may be a symbol."""

    w_ih: Any
    w_hh: Any
    b_ih: Any
    b_hh: Any
    rows: Dim
    hidden: int


def _linear(b: Builder, x: Value, weight: Any, bias: Any) -> Value:
    """`x W^T + bias`; a weight that is decoded from codes is decoded in the product, row by row."""
    value, offset = b.value(weight), None if bias is None else b.value(bias)
    maker = next((op for op in b.program.ops if value.name in op.outputs), None)
    if maker is None or maker.kind != "decode":
        return b.emit("linear_f32", [x, value, offset])
    stored = [None if not n else Value(n, b.types[n].shape, b.types[n].dtype) for n in maker.inputs]
    operands = [x, *stored, *[None] * (3 - len(stored)), offset]
    return b.emit("linear_w", operands, bits=maker.attrs["bits"], n=maker.attrs["shape"][1])


def _gates(b: Builder, x: Value, layer: _Layer, count: int) -> list[Value]:
    """[N, count * H] -> count times [N, H]."""
    h, out = layer.hidden, []
    for i in range(count):
        bounds = {"starts": [0, i * h], "stops": [layer.rows, (i + 1) * h], "steps": [1, 1]}
        out.append(b.emit("slice", [x], **bounds))
    return out


def _row(b: Builder, x: Value, index: int, sizes: list[Dim]) -> Value:
    """[n, *sizes] -> [*sizes]: entry `index` of the first axis."""
    rank = 1 + len(sizes)
    bounds = {"starts": [index, *[0] * len(sizes)], "stops": [index + 1, *sizes], "steps": [1] * rank}
    return b.emit("reshape", [b.emit("slice", [x], **bounds)], shape=sizes)


def _stack(b: Builder, parts: list[Value], sizes: list[Dim]) -> Value:
    """n times [*sizes] -> [n, *sizes]."""
    return b.emit("concat", [b.emit("reshape", [p], shape=[1, *sizes]) for p in parts], axis=0)


def lstm_step(b: Builder, given: Value, states: States, layer: _Layer) -> States:
    """`i, f, g, o = given + h W^T + b`, `c' = s(f) c + s(i) tanh(g)`, `h' = s(o) tanh(c')`; given [N, 4H]."""
    h, c = states
    i, f, g, o = _gates(b, binary(b, "add", given, _linear(b, h, layer.w_hh, layer.b_hh)), layer, 4)
    kept = binary(b, "mul", unary(b, f, "sigmoid"), c)
    c = binary(b, "add", kept, binary(b, "mul", unary(b, i, "sigmoid"), unary(b, g, "tanh")))
    return binary(b, "mul", unary(b, o, "sigmoid"), unary(b, c, "tanh")), c


def gru_step(b: Builder, given: Value, states: States, layer: _Layer) -> States:
    """`r, z = s(a + b)`, `n = tanh(a_n + r b_n)`, `h' = (1 - z) n + z h`; given = a [N, 3H], b = h W^T + bias."""
    (h,) = states
    ar, az, an = _gates(b, given, layer, 3)
    br, bz, bn = _gates(b, _linear(b, h, layer.w_hh, layer.b_hh), layer, 3)
    r = unary(b, binary(b, "add", ar, br), "sigmoid")
    z = unary(b, binary(b, "add", az, bz), "sigmoid")
    n = unary(b, binary(b, "add", an, binary(b, "mul", r, bn)), "tanh")
    fresh = binary(b, "mul", unary(b, z, "rsub", 1.0), n)
    return (binary(b, "add", fresh, binary(b, "mul", z, h)),)


Step = Callable[[Builder, Value, States, _Layer], States]


def _direction(
    b: Builder, step: Step, x: Value, states: States, layer: _Layer, steps: int, reverse: bool
) -> tuple[Value, States]:
    """One layer, one direction: x [T, N, I], states [N, H] -> y [T, N, H], last states."""
    given = _linear(b, x, layer.w_ih, layer.b_ih)
    gates = b.type_of(given).ints[-1]
    rows: dict[int, Value] = {}
    for t in range(steps - 1, -1, -1) if reverse else range(steps):
        states = step(b, _row(b, given, t, [layer.rows, gates]), states, layer)
        rows[t] = states[0]
    return _stack(b, [rows[t] for t in range(steps)], [layer.rows, layer.hidden]), states


def _sequence(b: Builder, args: Any, step: Step, x: Value, states: States) -> list[Value]:
    """All layers and directions. States are [layers * directions, N, H]."""
    params, has_biases, layers, dropout, train, bidirectional, batch_first = args
    directions, count = 2 if bidirectional else 1, 4 if has_biases else 2
    if len(params) != layers * directions * count:
        raise LowerError(
            "a recurrent layer that projects its states has no program form", site=b.site, hint=b.where
        )
    if train and dropout:
        raise LowerError("a recurrent layer with dropout has no program form", site=b.site, hint=b.where)
    steps, rows = (x.shape[1], x.shape[0]) if batch_first else (x.shape[0], x.shape[1])
    if not isinstance(steps, int):
        raise LowerError(
            "a recurrent layer in float needs a length that is known",
            site=b.site,
            hint=f"{b.where} Quantize it, or fix the length: dynamic={{0: (0,)}}.",
        )
    x = b.emit("transpose", [x], perm=[1, 0, 2]) if batch_first else x
    hidden = b.type_of(states[0]).ints[2]
    ends: list[States] = []
    for first in range(0, layers * directions, directions):
        outputs = []
        for k in range(first, first + directions):
            w_ih, w_hh, b_ih, b_hh = [*params[k * count : (k + 1) * count], None, None][:4]
            initial = tuple(_row(b, s, k, [rows, hidden]) for s in states)
            layer = _Layer(w_ih, w_hh, b_ih, b_hh, rows, hidden)
            y, end = _direction(b, step, x, initial, layer, steps, reverse=k > first)
            outputs.append(y)
            ends.append(end)
        x = outputs[0] if directions == 1 else b.emit("concat", outputs, axis=2)
    if batch_first:
        x = b.emit("transpose", [x], perm=[1, 0, 2])
    return [x, *(_stack(b, [end[i] for end in ends], [rows, hidden]) for i in range(len(states)))]


@handles("aten.lstm.input")
def _lstm(b: Builder, args: Any, kwargs: Any) -> list[Value]:
    x, (h, c), *rest = args
    return _sequence(b, rest, lstm_step, b.value(x), (b.value(h), b.value(c)))


@handles("aten.gru.input")
def _gru(b: Builder, args: Any, kwargs: Any) -> list[Value]:
    x, h, *rest = args
    return _sequence(b, rest, gru_step, b.value(x), (b.value(h),))


def _cell(b: Builder, step: Step, args: Any, states: States) -> States:
    """One step of a cell: x [N, I], states [N, H]."""
    x = b.value(args[0])
    w_ih, w_hh, b_ih, b_hh = [*args[2:], None, None][:4]
    layer = _Layer(w_ih, w_hh, b_ih, b_hh, x.shape[0], b.type_of(states[0]).ints[1])
    return step(b, _linear(b, x, w_ih, b_ih), states, layer)


@handles("aten.lstm_cell.default")
def _lstm_cell(b: Builder, args: Any, kwargs: Any) -> list[Value]:
    h, c = args[1]
    return list(_cell(b, lstm_step, args, (b.value(h), b.value(c))))


@handles("aten.gru_cell.default")
def _gru_cell(b: Builder, args: Any, kwargs: Any) -> Value:
    (h,) = _cell(b, gru_step, args, (b.value(args[1]),))
    return h

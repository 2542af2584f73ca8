"""Signs of what is computed become thresholds on what it is computed from: batch norm and sign are one comparison.

Every step is monotone in exact and in float arithmetic, so `f(x) >= t` holds from one value of x on, or up to one. That
value is found by bisection with f as the interpreter computes it: nothing is rounded anew, the bits stay as they were.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from pennyweight.program.ir import Array, Op, Program, replace
from pennyweight.program.ops.functions import clip
from pennyweight.program.rewrite.graph import View, add_constant, rebuilt

F32 = np.float32
Step = Callable[[Array], Array]  # values of [C] candidates to what the sign op sees
# keys that ascend with the values they stand for, inclusive, by dtype of the operand; infinities times 0 are no numbers
_KEYS = {"i32": (-(2**31) + 1, 2**31 - 1), "u8": (0, 255), "f32": (-0x7F7FFFFF, 0x7F7FFFFF)}

_ARITHMETIC: dict[str, Callable[[Array, Array], Array]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
}


def values_of(keys: Array, dtype: str) -> Array:
    """Keys int64 to values of a dtype; of floats all of them in order."""
    if dtype == "f32":
        bits = np.where(keys < 0, 0x80000000 - keys, keys)
        return bits.astype(np.uint32).view(F32)
    return keys.astype({"i32": np.int32, "u8": np.uint8}[dtype])


def threshold(step: Step, limit: Array, dtype: str, channels: int) -> tuple[Array, Array]:
    """Thresholds t and flips with `(x >= t) xor flip == (step(x) >= limit)` for all x but NaN.

    step: monotone in every channel. Shapes: limit [C] or [1], results [C].
    """
    low, high = (np.full(channels, k, np.int64) for k in _KEYS[dtype])

    def reaches(keys: Array) -> Array:
        with np.errstate(all="ignore"):
            return np.asarray(step(values_of(keys, dtype)) >= limit)

    first, last = reaches(low), reaches(high)
    constant = first == last
    # the least key whose answer is that of the last
    a, b = low.copy(), high.copy()  # answer at a differs from that at b
    while bool(np.any((b - a > 1) & ~constant)):
        middle = (a + b) // 2
        same = reaches(middle) == last
        a, b = np.where(same, a, middle), np.where(same, middle, b)
    t = values_of(np.where(constant, low, b), dtype)
    if dtype == "f32":
        t = np.where(constant, F32(-np.inf), t)
    return t, np.where(constant, ~first, ~last).astype(np.uint8)


class _Thresholds:
    def __init__(self, program: Program) -> None:
        self.program = replace(program, constants=dict(program.constants))
        self.view = View(program)

    def run(self) -> Program:
        ops = [self.moved(op) if op.kind == "sign" else op for op in self.program.ops]
        return rebuilt(self.program, ops, {})

    def moved(self, op: Op) -> Op:
        """The same bits from one op further up, where there is one to skip."""
        found = self.step(op)
        stored = self.program.constants[op.inputs[1]].data
        if found is None:
            return op
        source, step = found
        kind = self.view.types[source]
        channels = self.view.types[op.inputs[0]].shape[-1]
        if not isinstance(channels, int):
            return op
        t, flip = threshold(step, stored, kind.dtype, channels)
        if len(op.inputs) > 2 and op.inputs[2]:
            flip = flip ^ self.program.constants[op.inputs[2]].data
        if (t == t[0]).all():
            t = t[:1]
        names = [add_constant(self.program, f"{op.site}.threshold", t)]
        if flip.any():
            names.append(add_constant(self.program, f"{op.site}.flip", flip))
        return replace(op, inputs=(source, *names))

    def step(self, op: Op) -> tuple[str, Step] | None:
        """What the sign's operand is computed from, and how."""
        name = op.inputs[0]
        maker = self.view.maker.get(name)
        if maker is None:
            return None
        source, a = maker.inputs[0], maker.attrs
        if maker.kind == "dequantize":
            return source, lambda q: (q.astype(F32) - F32(a["zero"])) * F32(a["scale"])
        if self.view.uses(name) > 1:
            return None  # it is computed anyway, and lies in the cache
        if maker.kind == "rescale" and not (len(maker.inputs) > 3 and maker.inputs[3]):
            return self.rescaled(maker)
        if maker.kind == "unary" and a["fn"] == "clip":
            return source, lambda x: clip(x, a["p"], a["q"])
        if maker.kind == "binary" and a["fn"] in _ARITHMETIC:
            return self.with_constant(maker)
        return None

    def rescaled(self, maker: Op) -> tuple[str, Step] | None:
        multiplier = self.view.array(maker.inputs[1])
        bias = self.view.array(maker.inputs[2]) if len(maker.inputs) > 2 and maker.inputs[2] else None
        if multiplier is None or (bias is None and len(maker.inputs) > 2 and maker.inputs[2]):
            return None

        def step(acc: Array) -> Array:
            t = acc.astype(F32) * multiplier
            return t if bias is None else t + bias

        return maker.inputs[0], step

    def with_constant(self, maker: Op) -> tuple[str, Step] | None:
        """A sum or product with a number for each channel: what is left of a batch norm."""
        fn = _ARITHMETIC[maker.attrs["fn"]]
        orders = [maker.inputs] if maker.attrs["fn"] == "sub" else [maker.inputs, maker.inputs[::-1]]
        for source, other in orders:
            data: Any = self.view.array(other)
            shape = self.view.types[maker.outputs[0]].shape
            if data is None or self.view.types[source].shape != shape:
                continue
            if data.size not in (1, data.shape[-1] if data.ndim else 1):
                continue
            flat = data.reshape(-1)
            return source, lambda x, flat=flat: np.asarray(fn(x, flat), F32)
        return None


def lower_signs(program: Program) -> Program:
    """One step up for every sign that can go."""
    return _Thresholds(program).run()

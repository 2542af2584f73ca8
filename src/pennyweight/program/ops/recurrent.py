"""Recurrent layers on codes, inputs and states ranged at every step."""

from __future__ import annotations

from typing import Any

import numpy as np

from pennyweight.program.ir import Array, TensorType
from pennyweight.program.ops import Attrs, Operands, Types, array, define, real, require, want
from pennyweight.program.ops.functions import ONE, sigmoid, tanh
from pennyweight.program.ops.integer import DynamicQuantize

F32 = np.float32


def _product(x: Array, weight: Any, scale: Any, bias: Any) -> Array:
    """`float32(acc) * sx * sw + b`, x [rows, n] ranged per row."""
    codes, sx, zx = DynamicQuantize.run([x], {"per_token": True})
    acc = ((codes.astype(np.float64) - zx) @ array(weight).astype(np.float64).T).astype(np.int32)
    y = acc.astype(F32) * sx
    y = y * real(scale)
    return y if bias is None else y + real(bias)


def _check(types: Types, gates: int, states: int) -> tuple[tuple[int, ...], int]:
    x = want(types[0], "f32")
    w_ih, w_hh = want(types[1 + states], "i8"), want(types[3 + states], "i8")
    require(len(x) == 3, f"x {x} is not [T, N, I]")
    hidden = w_hh[1]
    require(
        w_ih == (gates * hidden, x[2]) and w_hh == (gates * hidden, hidden),
        f"weights {w_ih}, {w_hh} for x {x}",
    )
    for i in (2 + states, 4 + states):
        require(want(types[i], "f32") in ((1,), (gates * hidden,)), "scales do not fit")
    for i in (5 + states, 6 + states):
        require(
            len(types) <= i or types[i] is None or want(types[i], "f32") == (gates * hidden,),
            "bias does not fit",
        )
    for i in range(1, 1 + states):
        require(want(types[i], "f32") == (x[1], hidden), f"state {i} is not [N, H]")
    return x, hidden


@define("lstm", "reverse")
class LSTM:
    """One layer, one direction.

        g_t = product(x_t, W_ih, b_ih) + product(h_{t-1}, W_hh, b_hh)      gates i, f, g, o of H rows each
        c_t = sigmoid(f) * c_{t-1} + sigmoid(i) * tanh(g),   h_t = sigmoid(o) * tanh(c_t)

    where product ranges every row at run time: `float32(acc) * sx * sw + b`.
    x f32 [T, N, I], h0 f32 [N, H], c0 f32 [N, H], W_ih i8 [4H, I], its scales f32 [4H] or [1], W_hh i8 [4H, H], its
    scales, b_ih f32 [4H] or absent, b_hh f32 [4H] or absent -> y f32 [T, N, H], h, c f32 [N, H].
    Source: Hochreiter and Schmidhuber 1997; gate order as torch.nn.LSTM.
    """

    @staticmethod
    def infer(types: Types, attrs: Attrs) -> list[TensorType]:
        """y, h, c."""
        x, hidden = _check(types, 4, 2)
        state = TensorType("f32", (x[1], hidden))
        return [TensorType("f32", (x[0], x[1], hidden)), state, state]

    @staticmethod
    def run(x: Operands, a: Attrs) -> list[Array]:
        """See the class."""
        v, h, c = array(x[0]), array(x[1]), array(x[2])
        b_ih, b_hh = (x[i] if len(x) > i else None for i in (7, 8))
        steps, rows = v.shape[:2]
        given = _product(v.reshape(steps * rows, -1), x[3], x[4], b_ih).reshape(steps, rows, -1)
        y = np.zeros((steps, rows, h.shape[1]), F32)
        for t in range(steps - 1, -1, -1) if a["reverse"] else range(steps):
            gates = given[t] + _product(h, x[5], x[6], b_hh)
            i, f, g, o = np.split(gates, 4, axis=1)
            c = sigmoid(f) * c + sigmoid(i) * tanh(g)
            h = sigmoid(o) * tanh(c)
            y[t] = h
        return [y, h, c]


@define("gru", "reverse")
class GRU:
    """One layer, one direction.

        a = product(x_t, W_ih, b_ih),   b = product(h_{t-1}, W_hh, b_hh)      gates r, z, n of H rows each
        r = sigmoid(a_r + b_r),   z = sigmoid(a_z + b_z),   n = tanh(a_n + r * b_n),   h_t = (1 - z) * n + z * h_{t-1}

    x f32 [T, N, I], h0 f32 [N, H], W_ih i8 [3H, I], scales, W_hh i8 [3H, H], scales, b_ih, b_hh -> y f32 [T, N, H], h.
    Source: Cho et al. 2014 (arXiv:1406.1078); gate order as torch.nn.GRU.
    """

    @staticmethod
    def infer(types: Types, attrs: Attrs) -> list[TensorType]:
        """y, h."""
        x, hidden = _check(types, 3, 1)
        return [TensorType("f32", (x[0], x[1], hidden)), TensorType("f32", (x[1], hidden))]

    @staticmethod
    def run(x: Operands, a: Attrs) -> list[Array]:
        """See the class."""
        v, h = array(x[0]), array(x[1])
        b_ih, b_hh = (x[i] if len(x) > i else None for i in (6, 7))
        steps, rows = v.shape[:2]
        given = _product(v.reshape(steps * rows, -1), x[2], x[3], b_ih).reshape(steps, rows, -1)
        y = np.zeros((steps, rows, h.shape[1]), F32)
        for t in range(steps - 1, -1, -1) if a["reverse"] else range(steps):
            ar, az, an = np.split(given[t], 3, axis=1)
            br, bz, bn = np.split(_product(h, x[4], x[5], b_hh), 3, axis=1)
            r, z = sigmoid(ar + br), sigmoid(az + bz)
            n = tanh(an + r * bn)
            h = (ONE - z) * n + z * h
            y[t] = h
        return [y, h]

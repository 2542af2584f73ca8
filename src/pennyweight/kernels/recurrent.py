"""Recurrent layers on codes in plain torch, step for step as the program ops `lstm` and `gru`."""

from __future__ import annotations

import torch
from torch import Tensor

from pennyweight.kernels.functions import sigmoid, tanh
from pennyweight.kernels.reference import rescale, to_codes
from pennyweight.nn.fake import dynamic_params

EXACT_IN_FLOAT32 = (1 << 24) // (255 * 128)  # so many products of codes have exact partial sums in float32


def product(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """`float32(acc) * sx * sw + b`, every row of x ranged for itself.

    Shapes: x [rows, n], codes int8 [out, n], scale [out] or [1], bias [out] -> [rows, out].
    """
    x_scale, x_zero = dynamic_params(x, per_token=True)
    q = to_codes(x, x_scale, x_zero) - x_zero
    if q.shape[1] <= EXACT_IN_FLOAT32:
        acc = q @ codes.to(torch.float32).T
    else:
        acc = q.double() @ codes.double().T
    return rescale(acc, x_scale, scale, bias)


def lstm(
    x: Tensor, h: Tensor, c: Tensor, w_ih: Tensor, s_ih: Tensor, w_hh: Tensor, s_hh: Tensor, b_ih: Tensor | None,
    b_hh: Tensor | None, reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """One layer, one direction: x [T, N, I], states [N, H] -> y [T, N, H], h, c; see the program op of that name."""
    steps, rows, hidden = x.shape[0], x.shape[1], h.shape[1]
    given = product(x.reshape(steps * rows, -1), w_ih, s_ih, b_ih).reshape(steps, rows, -1)
    y = x.new_zeros(steps, rows, hidden)
    h, c = h.clone(), c.clone()
    for t in range(steps - 1, -1, -1) if reverse else range(steps):
        gates = given[t] + product(h, w_hh, s_hh, b_hh)
        i, f, g, o = gates.split(hidden, 1)
        i, f, o = sigmoid(torch.cat([i, f, o], 1)).split(hidden, 1)
        c = f * c + i * tanh(g)
        h = o * tanh(c)
        y[t] = h
    return y, h, c


def gru(
    x: Tensor, h: Tensor, w_ih: Tensor, s_ih: Tensor, w_hh: Tensor, s_hh: Tensor, b_ih: Tensor | None,
    b_hh: Tensor | None, reverse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One layer, one direction: x [T, N, I], state [N, H] -> y [T, N, H], h; see the program op of that name."""
    steps, rows, hidden = x.shape[0], x.shape[1], h.shape[1]
    given = product(x.reshape(steps * rows, -1), w_ih, s_ih, b_ih).reshape(steps, rows, -1)
    y = x.new_zeros(steps, rows, hidden)
    h = h.clone()
    for t in range(steps - 1, -1, -1) if reverse else range(steps):
        a, b = given[t], product(h, w_hh, s_hh, b_hh)
        r, z = sigmoid(a[:, : 2 * hidden] + b[:, : 2 * hidden]).split(hidden, 1)
        n = tanh(a[:, 2 * hidden :] + r * b[:, 2 * hidden :])
        h = (1.0 - z) * n + z * h
        y[t] = h
    return y, h

"""Rounding in training as one opaque op with a pseudo-gradient: one pass over memory each way.

`pennyweight::fake_quantize` runs on libpennyweight for float32 and bfloat16 on the CPU and in plain torch elsewhere.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pennyweight.kernels import native
from pennyweight.runtime import library

_DTYPES = {torch.float32: 0, torch.bfloat16: 2}
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
SLACK = 1e-4  # of a step: the value that set the range is inside, however its code was rounded
SMALLEST = 1e-12  # of a scale in training: learned ones may pass through zero

_library = torch.library.Library("pennyweight", "FRAGMENT")
_library.define(
    "fake_quantize(Tensor x, Tensor scale, Tensor? zero, float low, float high, float delta, float gain, int learns) "
    "-> Tensor"
)
_library.define(
    "fake_gradient(Tensor x, Tensor grad, Tensor scale, Tensor? zero, float low, float high, float delta) "
    "-> (Tensor, Tensor)"
)


def positive(scale: Tensor) -> Tensor:
    """`max(|s|, 1e-12)`, float32 [rows]."""
    return scale.detach().float().reshape(-1).abs().clamp_min(SMALLEST)


def _dense(x: Tensor, rows: int) -> Tensor:
    """Laid out without holes; rows of one scale each must be contiguous."""
    if rows == 1 and x.ndim in _CHANNELS_LAST and x.is_contiguous(memory_format=_CHANNELS_LAST[x.ndim]):
        return x
    return x.contiguous()


def _runs(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype in _DTYPES and x.numel() > 0 and native.backend() == "native"


def _pointers(scale: Tensor, zero: Tensor | None) -> tuple[Tensor, Tensor | None]:
    s = positive(scale).contiguous()
    return s, None if zero is None else zero.detach().float().reshape(-1).contiguous()


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    low: float,
    high: float,
    delta: float,
    gain: float,
    learns: int,
) -> Tensor:
    """`y = (clamp(rint(x * r) + z, low, high) - z) * s`, `r = 1 / s`; any shape, scale [rows] over x as [rows, n].

    Args:
        x: rows of equal length, one after another.
        scale: [rows].
        zero: [rows], whole numbers.
        low: least code.
        high: greatest code.
        delta: of the gradient only, as the next two; see `gradients.affine`.
        gain: factor of the scale's gradient.
        learns: `STEP` or `CLIP`.
    """
    rows = scale.numel()
    x = _dense(x, rows)
    s, z = _pointers(scale, zero)
    if _runs(x):
        y = torch.empty_like(x)
        library.load().pw_fake_quantize(
            _DTYPES[x.dtype], x.data_ptr(), y.data_ptr(), rows, x.numel() // rows, s.data_ptr(),
            None if z is None else z.data_ptr(), low, high, torch.get_num_threads(),
        )  # fmt: skip
        return y
    t = x.reshape(rows, -1).float() * (1.0 / s)[:, None]
    bottom, top = _bounds(s, z, low, high)
    q = torch.minimum(torch.maximum(torch.round(t), bottom), top)
    # laid out as x, as the native kernel does
    return torch.empty_like(x).copy_((q * s[:, None]).reshape(x.shape))


def _bounds(s: Tensor, z: Tensor | None, low: float, high: float) -> tuple[Tensor, Tensor]:
    zero = torch.zeros_like(s) if z is None else z
    return (low - zero)[:, None], (high - zero)[:, None]


def fake_gradient(
    x: Tensor, grad: Tensor, scale: Tensor, zero: Tensor | None, low: float, high: float, delta: float
) -> tuple[Tensor, Tensor]:
    """With `t = x * r` and `lo, hi` the bounds less the zero point:

        dx = g * (1 + delta * sign(g) * (t - rint(t)))  where lo <= t <= hi (to 1e-4),  0 elsewhere
        sums = [sum g * (rint(t) - t) inside,  sum g below,  sum g above]

    Returns dx as x, and sums [rows, 3] float32.
    """
    rows = scale.numel()
    x = _dense(x, rows)
    if grad.stride() != x.stride() or grad.dtype != x.dtype:
        grad = torch.empty_like(x).copy_(grad)
    s, z = _pointers(scale, zero)
    if _runs(x):
        dx = torch.empty_like(x)
        sums = torch.empty(rows, 3, dtype=torch.float64)
        library.load().pw_fake_gradient(
            _DTYPES[x.dtype], x.data_ptr(), grad.data_ptr(), dx.data_ptr(), rows, x.numel() // rows, s.data_ptr(),
            None if z is None else z.data_ptr(), low, high, delta, sums.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return dx, sums.float()
    t, g = x.reshape(rows, -1).float() * (1.0 / s)[:, None], grad.reshape(rows, -1).float()
    bottom, top = _bounds(s, z, low, high)
    error = torch.round(t) - t
    below, above = t < bottom - SLACK, t > top + SLACK
    inside = ~(below | above)
    dx = torch.where(inside, g * (1.0 - delta * torch.sign(g) * error), torch.zeros_like(g))
    parts = [(g * error * inside).sum(1), (g * below).sum(1), (g * above).sum(1)]
    return torch.empty_like(x).copy_(dx.reshape(x.shape)), torch.stack(parts, 1)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, scale, zero, ctx.low, ctx.high, ctx.delta, ctx.gain, ctx.learns = inputs
    ctx.save_for_backward(x, scale, zero)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, scale, zero = ctx.saved_tensors
    dx, sums = torch.ops.pennyweight.fake_gradient(x, grad, scale, zero, ctx.low, ctx.high, ctx.delta)
    ds = dz = None
    if ctx.needs_input_grad[1]:
        z = 0.0 if zero is None else zero.reshape(-1)
        ds = sums[:, 1] * (ctx.low - z) + sums[:, 2] * (ctx.high - z)
        ds = ds if ctx.learns == CLIP else ds + sums[:, 0]
        ds = (
            (ds * torch.where(scale.reshape(-1) < 0, -ctx.gain, ctx.gain))
            .reshape(scale.shape)
            .to(scale.dtype)
        )
    if zero is not None and ctx.needs_input_grad[2]:
        size = scale.reshape(-1).abs().clamp_min(SMALLEST)
        dz = (-size * (sums[:, 1] + sums[:, 2]) * ctx.gain).reshape(zero.shape).to(zero.dtype)
    return dx, ds, dz, None, None, None, None, None


STEP, CLIP = 0, 1  # how the scale learns: as a step (LSQ), or as a clipping point (PACT)

_library.impl("fake_quantize", fake_quantize, "CompositeExplicitAutograd")
_library.impl("fake_gradient", fake_gradient, "CompositeExplicitAutograd")
torch.library.register_fake(
    "pennyweight::fake_quantize",
    lambda x, scale, *a: torch.empty_like(_dense(x, scale.numel())),
    lib=_library,
)
torch.library.register_fake(
    "pennyweight::fake_gradient",
    lambda x, grad, scale, *a: (
        torch.empty_like(_dense(x, scale.numel())),
        x.new_empty([scale.numel(), 3], dtype=torch.float32),
    ),
    lib=_library,
)
torch.library.register_autograd("pennyweight::fake_quantize", _backward, setup_context=_setup, lib=_library)

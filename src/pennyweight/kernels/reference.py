"""The opaque ops in plain torch: exact integers (in float64, which holds them), and the definition the engine meets.

Everything follows docs/numerics.md.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pennyweight.kernels.functions import exp, lane_sum
from pennyweight.nn.conv import backward_weight
from pennyweight.nn.fake import dynamic_params
from pennyweight.nn.integer import unpack_nibbles, unpack_signs
from pennyweight.nn.packing import weight_codes

Ints = list[int]


def to_codes(x: Tensor, scale: Tensor, zero: Tensor, top: int = 255) -> Tensor:
    """Unsigned codes, as float32: `clamp(rint(x * r) + z, 0, top)`, `r = float32(1 / s)`. Scales broadcast."""
    q = torch.round(x.float() * (1.0 / scale)) + zero
    low, high = q.new_tensor(0.0), q.new_tensor(float(top))
    return torch.fmin(torch.fmax(q, low), high)


def round_to_codes(
    x: Tensor, scale: Tensor, zero: Tensor, high: int = 255, levels: Tensor | None = None
) -> Tensor:
    """`(codes - z) * s`; with `levels`, uint8 [256], of the codes that these make of them."""
    codes = to_codes(x, scale, zero, high)
    if levels is not None:
        codes = levels[codes.long()].float()
    return (codes - zero) * scale


def rescale(acc: Tensor, row: Tensor, column: Tensor, bias: Tensor | None) -> Tensor:
    """`float32(acc) * row * column + bias`, in this order, every step float32."""
    y = acc.float() * row
    y = y * column
    return y if bias is None else y + bias


def linear(
    x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, x_scale: Tensor, x_zero: Tensor,
    table: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`y = float32(acc) * float32(sx * sw)`, `acc = sum (qx - zx) qw + bias`; a float bias is added last."""
    q = (to_codes(x, x_scale, x_zero) - x_zero).double()
    w = weight_codes(codes, table, x.shape[-1])
    return _static(q @ w.double().T, bias, static_scale(x_scale, scale))


def _static(acc: Tensor, bias: Tensor | None, multiplier: Tensor) -> Tensor:
    if bias is None:
        return acc.float() * multiplier
    if bias.is_floating_point():
        return acc.float() * multiplier + bias
    return (acc + bias.double()).float() * multiplier


def static_scale(x_scale: Tensor, scale: Tensor) -> Tensor:
    """`float32(float64(sx) * float64(sw))`."""
    return (x_scale.double() * scale.double()).float()


def linear_dynamic(
    x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, per_token: bool, table: Tensor | None = None
) -> Tensor:
    """Activations ranged per row or per tensor at run time."""
    x_scale, x_zero = dynamic_params(x, per_token)
    q = (to_codes(x, x_scale, x_zero) - x_zero).double()
    return rescale(q @ weight_codes(codes, table, x.shape[-1]).double().T, x_scale, scale, bias)


def decode(codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int, n: int) -> Tensor:
    """Float weights [out, in] of stored codes."""
    if bits == 4:
        codes = unpack_nibbles(codes, n)
    groups = scale.shape[1]
    w = codes.float().unflatten(1, (groups, -1))  # [out, groups, group]
    if zero is not None:
        w = w - zero.unsqueeze(-1)
    out: Tensor = (w * scale.unsqueeze(-1)).flatten(1)
    return out


def decode_levels(codes: Tensor, levels: Tensor, scale: Tensor, bits: int, n: int) -> Tensor:
    """`levels[code] * scale`, [out, n]; codes of 4 bits lie two to a byte, low nibble first."""
    if bits == 4:
        codes = torch.stack([codes & 15, codes >> 4], -1).flatten(1)[:, :n]
    w = levels[codes.long()].unflatten(1, (scale.shape[1], -1))
    out: Tensor = (w * scale.unsqueeze(-1)).flatten(1)
    return out


def linear_grouped(
    x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, per_token: bool, bits: int, n: int
) -> Tensor:
    """Activations ranged at run time, weights [out, n] with one scale for every group of inputs.

        t = sum_g float32(acc_g) * sw[:, g]  (g ascending, from 0),   y = t * sx + bias

    acc_g: the int32 product of group g. Shapes: x [..., n], scale [out, groups], codes packed by two where bits is 4.
    """
    x_scale, x_zero = dynamic_params(x, per_token)
    q = (to_codes(x, x_scale, x_zero) - x_zero).double()
    w = (unpack_nibbles(codes, n) if bits == 4 else codes).double()
    size = n // scale.shape[1]
    total = x_scale.new_zeros(*x.shape[:-1], w.shape[0])
    for g in range(scale.shape[1]):
        part = slice(g * size, (g + 1) * size)
        total = total + (q[..., part] @ w[:, part].T).float() * scale[:, g]
    y = total * x_scale
    return y if bias is None else y + bias


def past_attention(
    q: Tensor, k: Tensor, v: Tensor, past: Tensor, count: Tensor, block: int, factor: float
) -> Tensor:
    """Attention over `count` earlier tokens and those of the new ones that are not later; see the op of programs.

    Shapes: q [1, n, H, W], k and v [1, n, G, W], past [2, blocks, G, places, W], count [1] -> [1, n, H, W].
    """
    n, places = q.shape[1], past.shape[3]
    keys, values = (torch.cat([past[i, block][None], new.transpose(1, 2)], 2) for i, new in ((0, k), (1, v)))
    order = torch.arange(n)
    seen = torch.cat([(torch.arange(places) < count).expand(n, places), order[None] <= order[:, None]], 1)
    y = F.scaled_dot_product_attention(q.transpose(1, 2), keys, values, seen, scale=factor, enable_gqa=True)
    return y.transpose(1, 2)


def past_attention_rounded(
    q: Tensor, k: Tensor, v: Tensor, past: Tensor, ranges: Tensor, count: Tensor, block: int, factor: float
) -> tuple[Tensor, ...]:
    """The same, keys and values being codes of a scale and a zero point for each token and head.

    Shapes: as there, past uint8, ranges [2, blocks, G, places, 2] -> y [1, n, H, W], codes of k and of v uint8
    [1, n, G, W], their ranges [1, n, G, 2].
    """
    kept = (past.float() - ranges[..., 1:]) * ranges[..., :1]
    rounded, codes, spans = [], [], []
    for x in (k, v):
        scale, zero = dynamic_params(x, True)
        c = to_codes(x, scale, zero)
        rounded.append((c - zero) * scale)
        codes.append(c.to(torch.uint8))
        spans.append(torch.cat([scale, zero.float()], -1))
    return past_attention(q, rounded[0], rounded[1], kept, count, block, factor), *codes, *spans


def hadamard(x: Tensor, size: int) -> Tensor:
    """Runs of `size` numbers of the last axis times the orthonormal Hadamard matrix; see the op of programs."""
    y, h = x.float().contiguous().reshape(-1), 1
    while h < size:
        first, second = y.reshape(-1, 2, h).unbind(1)
        y, h = torch.stack([first + second, first - second], 1), 2 * h
    return (y.reshape(x.shape) * float(np.float32(1 / np.sqrt(size)))).to(x.dtype)


def linear_weight(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, bits: int, n: int
) -> Tensor:
    """Float activations, decoded weights."""
    return F.linear(x, decode(codes, scale, zero, bits, n).to(x.dtype), bias)


def _convolve(
    x: Tensor,
    weight: Tensor,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    extra: Ints,
    groups: int,
    transposed: bool,
) -> Tensor:
    dims = len(stride)
    if transposed:
        transpose: Any = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}[dims]
        weight = backward_weight(weight, True, groups)
        y: Tensor = transpose(x, weight, None, stride, padding, extra, groups, dilation)
    else:
        plain: Any = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[dims]
        y = plain(x, weight, None, stride, padding, dilation, groups)
    return y


def per_channel(v: Tensor, dims: int) -> Tensor:
    """[out] to [out, 1, ...] for broadcasting over `dims` spatial axes."""
    return v.reshape(-1, *[1] * dims)


def conv(
    x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, x_scale: Tensor, x_zero: Tensor, shape: Ints,
    stride: Ints, padding: Ints, dilation: Ints, extra: Ints, groups: int, transposed: bool,
    table: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Convolution on codes; padding is with zero, that is with code `zx`."""
    q = (to_codes(x, x_scale, x_zero) - x_zero).double()
    w = weight_codes(codes, table, math.prod(shape[1:]))
    acc = _convolve(q, w.double().reshape(shape), stride, padding, dilation, extra, groups, transposed)
    dims = len(stride)
    shaped = None if bias is None else per_channel(bias, dims)
    return _static(acc, shaped, per_channel(static_scale(x_scale, scale), dims))


def signs(x: Tensor) -> Tensor:
    """1 where x >= 0, else -1; float64."""
    return torch.where(x.float() >= 0, 1.0, -1.0).double()


def linear_binary(
    x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, x_scale: Tensor, n: int
) -> Tensor:
    """`y = float32(sum sign(x) sign(w)) * float32(sx * sw) + bias`."""
    acc = signs(x) @ unpack_signs(codes, n).double().T
    y = acc.float() * static_scale(x_scale, scale)
    return y if bias is None else y + bias


def conv_binary(
    x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, x_scale: Tensor, shape: Ints,
    stride: Ints, padding: Ints, dilation: Ints, extra: Ints, groups: int, transposed: bool,
) -> Tensor:  # fmt: skip
    """Convolution of signs; what is padded is zero and adds nothing."""
    weight = unpack_signs(codes, math.prod(shape[1:])).double().reshape(shape)
    acc = _convolve(signs(x), weight, stride, padding, dilation, extra, groups, transposed)
    dims = len(stride)
    y = acc.float() * per_channel(static_scale(x_scale, scale), dims)
    return y if bias is None else y + per_channel(bias, dims)


def conv_dynamic(
    x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, shape: Ints, stride: Ints, padding: Ints,
    dilation: Ints, extra: Ints, groups: int, transposed: bool, table: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Convolution on codes, activations ranged per tensor at run time."""
    x_scale, x_zero = dynamic_params(x, per_token=False)
    q = (to_codes(x, x_scale, x_zero) - x_zero).double()
    w = weight_codes(codes, table, math.prod(shape[1:]))
    acc = _convolve(q, w.double().reshape(shape), stride, padding, dilation, extra, groups, transposed)
    dims = len(stride)
    return rescale(acc, x_scale, per_channel(scale, dims), None if bias is None else per_channel(bias, dims))


def conv_weight(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, bits: int, shape: Ints,
    stride: Ints, padding: Ints, dilation: Ints, extra: Ints, groups: int, transposed: bool,
) -> Tensor:  # fmt: skip
    """Float convolution with decoded weights."""
    weight = decode(codes, scale, zero, bits, math.prod(shape[1:]))
    return _float_conv(x, weight, bias, shape, stride, padding, dilation, extra, groups, transposed)


def linear_levels(
    x: Tensor, codes: Tensor, levels: Tensor, scale: Tensor, bias: Tensor | None, bits: int, n: int
) -> Tensor:
    """Float activations, weights of levels."""
    return F.linear(x, decode_levels(codes, levels, scale, bits, n).to(x.dtype), bias)


def conv_levels(
    x: Tensor, codes: Tensor, levels: Tensor, scale: Tensor, bias: Tensor | None, bits: int, shape: Ints,
    stride: Ints, padding: Ints, dilation: Ints, extra: Ints, groups: int, transposed: bool,
) -> Tensor:  # fmt: skip
    """Float convolution, weights of levels."""
    weight = decode_levels(codes, levels, scale, bits, math.prod(shape[1:]))
    return _float_conv(x, weight, bias, shape, stride, padding, dilation, extra, groups, transposed)


def _float_conv(
    x: Tensor, rows: Tensor, bias: Tensor | None, shape: Ints, stride: Ints, padding: Ints, dilation: Ints,
    extra: Ints, groups: int, transposed: bool,
) -> Tensor:  # fmt: skip
    weight = rows.reshape(shape).to(x.dtype)
    y = _convolve(x, weight, stride, padding, dilation, extra, groups, transposed)
    return y if bias is None else y + per_channel(bias, len(stride)).to(x.dtype)


def matmul(a: Tensor, b: Tensor, a_scale: Tensor, a_zero: Tensor, b_scale: Tensor, b_zero: Tensor) -> Tensor:
    """`float32(acc) * float32(sa * sb)`."""
    qa = (to_codes(a, a_scale, a_zero) - a_zero).double()
    qb = (to_codes(b, b_scale, b_zero) - b_zero).double()
    return (qa @ qb).float() * static_scale(a_scale, b_scale)


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, factor: float,
    q_scale: Tensor, q_zero: Tensor, k_scale: Tensor, k_zero: Tensor, v_scale: Tensor, v_zero: Tensor,
) -> Tensor:  # fmt: skip
    """Scores on codes, softmax in float32, probabilities on 0 .. 255 / 255, values on codes; as the program op."""
    qq = (to_codes(q, q_scale, q_zero) - q_zero).double()
    qk = (to_codes(k, k_scale, k_zero) - k_zero).double()
    qv = (to_codes(v, v_scale, v_zero) - v_zero).double()
    m = (q_scale.double() * k_scale.double() * factor).float()
    scores = (qq @ qk.transpose(-1, -2)).float() * m
    if causal:
        keep = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        scores = scores.masked_fill(~keep, float("-inf"))
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    e = exp(scores - scores.amax(-1, keepdim=True))
    p = torch.round(e * torch.div(e.new_tensor(255.0), lane_sum(e))).clamp(0.0, 255.0).double()
    return (p @ qv).float() * (v_scale.double() / 255.0).float()


def embedding(ids: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int, n: int) -> Tensor:
    """Decoded rows."""
    flat = ids.reshape(-1)
    rows = codes.index_select(0, flat)
    row_scale = scale.index_select(0, flat) if scale.shape[0] > 1 else scale.expand(len(flat), -1)
    row_zero = None
    if zero is not None:
        row_zero = zero.index_select(0, flat) if zero.shape[0] > 1 else zero.expand(len(flat), -1)
    return decode(rows, row_scale, row_zero, bits, n).reshape(*ids.shape, n)

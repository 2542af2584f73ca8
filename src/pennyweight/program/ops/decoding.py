"""Attention of tokens to come over what was kept of earlier ones."""

from __future__ import annotations

from typing import Any

import numpy as np

from pennyweight.program.ir import Array, TensorType
from pennyweight.program.ops import Attrs, Operands, Types, array, define, require, want
from pennyweight.program.ops.normalize import softmax_last

F32 = np.float32


@define("past_attention", "block factor", exact=False)
class PastAttention:
    """Attention of n tokens over `count` earlier ones and those of themselves that are not later:

        s_hij = factor * sum_w q[i, h, w] * key[g, j, w],   y[i, h] = sum_j softmax_j(s_hij) value[g, j]

    j runs over the first `count` places of past[:, block], then over the new tokens 0 .. i; head h reads keys and
    values of head g = h // (H / G). q f32 [1, n, H, W], k and v f32 [1, n, G, W], past f32 [2, blocks, G, places, W]
    (keys, then values), count i64 [1], 0 .. places -> f32 [1, n, H, W].
    Source: Vaswani et al. 2017 (arXiv:1706.03762), section 3.2; Ainslie et al. 2023 (arXiv:2305.13245) for the groups.
    """

    @staticmethod
    def infer(types: Types, attrs: Attrs) -> list[TensorType]:
        """[1, n, H, W]."""
        require(len(types) == 5, f"past_attention takes 5 operands, not {len(types)}")
        q, k, v = (want(t, "f32") for t in types[:3])
        require(k == v, f"keys {k} and values {v} differ in shape")
        return check_past(q, k, want(types[3], "f32"), types[4], attrs)

    @staticmethod
    def run(x: Operands, a: Attrs) -> list[Array]:
        """See the class."""
        q, k, v, past, count = (array(t) for t in x[:5])
        return [attention(q[0], k[0], v[0], past[:, a["block"]], int(count[0]), a)]


@define("past_attention_q", "block factor", exact=False)
class PastAttentionQ:
    """The same where keys and values are codes, of a scale and a zero point for each token and head:

        key = (float32(code) - z) * s

    q f32 [1, n, H, W], k u8 [1, n, G, W], its s f32 and z i32 [1, n, G, 1], v, its s and z alike, past u8 [2, blocks,
    G, places, W], ranges f32 [2, blocks, G, places, 2] (s, z), count i64 [1] -> f32 [1, n, H, W].
    """

    @staticmethod
    def infer(types: Types, attrs: Attrs) -> list[TensorType]:
        """[1, n, H, W]."""
        require(len(types) == 10, f"past_attention_q takes 10 operands, not {len(types)}")
        q, k, v, past = (
            want(types[0], "f32"),
            want(types[1], "u8"),
            want(types[4], "u8"),
            want(types[7], "u8"),
        )
        require(k == v and len(k) == 4, f"keys {k} and values {v} differ in shape")
        for scale, zero in (types[2:4], types[5:7]):
            require(want(scale, "f32") == want(zero, "i32") == (*k[:3], 1), f"ranges do not fit keys {k}")
        require(want(types[8], "f32") == (*past[:4], 2), f"ranges do not fit past {past}")
        return check_past(q, k, past, types[9], attrs)

    @staticmethod
    def run(x: Operands, a: Attrs) -> list[Array]:
        """See the class."""
        q, k, ks, kz, v, vs, vz, past, ranges, count = (array(t) for t in x)
        new = [((c - z).astype(F32) * s)[0] for c, s, z in ((k, ks, kz), (v, vs, vz))]
        kept, span = past[:, a["block"]].astype(F32), ranges[:, a["block"]]
        floats = (kept - span[..., 1:]) * span[..., :1]
        return [attention(q[0], new[0], new[1], floats, int(count[0]), a)]


def check_past(
    q: tuple[int, ...], k: tuple[int, ...], past: tuple[int, ...], count: Any, attrs: Attrs
) -> list[TensorType]:
    """Check that tokens, heads and widths fit each other; the result's type."""
    require(want(count, "i64") == (1,), "a count is one number")
    require(len(q) == 4 and len(k) == 4 and len(past) == 5, f"q {q}, k {k}, past {past}")
    require(
        q[0] == 1 and k[0] == 1 and (q[1], q[3]) == (k[1], k[3]),
        f"q {q} and k {k} are not of the same tokens",
    )
    require(k[2] > 0 and q[2] % k[2] == 0, f"{q[2]} heads do not share {k[2]}")
    require((past[0], past[2], past[4]) == (2, k[2], k[3]), f"past {past} does not fit k {k}")
    require(0 <= attrs["block"] < past[1], f"there is no block {attrs['block']} of {past[1]}")
    return [TensorType("f32", q)]


def attention(q: Array, k: Array, v: Array, past: Array, count: int, a: Attrs) -> Array:
    """See `PastAttention`. Shapes: q [n, H, W], k and v [n, G, W], past [2, G, places, W] -> [1, n, H, W]."""
    require(0 <= count <= past.shape[2], f"{count} of {past.shape[2]} places")
    if q.size == 0:
        return q[None]
    q, k, v = (t.transpose(1, 0, 2) for t in (q, k, v))
    keys, values = (np.concatenate([past[i, :, :count], new], 1) for i, new in ((0, k), (1, v)))
    times, n = len(q) // len(k), q.shape[1]
    keys, values = np.repeat(keys, times, 0), np.repeat(values, times, 0)
    s = (q @ keys.transpose(0, 2, 1)) * F32(a["factor"])
    later = np.arange(count + n)[None] > count + np.arange(n)[:, None]
    p = softmax_last(np.where(later, F32(-np.inf), s))
    y: Array = (p @ values).transpose(1, 0, 2)[None].astype(F32)
    return y

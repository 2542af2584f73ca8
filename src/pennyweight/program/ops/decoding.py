"""Attention of tokens to come over what was kept of earlier ones."""

from __future__ import annotations

import numpy as np

from pennyweight.program.ir import Array, TensorType
from pennyweight.program.ops import Attrs, Operands, Types, array, define, require, want
from pennyweight.program.ops.normalize import softmax_last


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
        q, k, v = (want(t, "f32") for t in types[:3])
        past, count = want(types[3], "f32"), want(types[4], "i64")
        require(count == (1,), f"a count of shape {count}")
        require(
            len(q) == 4 and len(k) == 4 and k == v and len(past) == 5, f"q {q}, k {k}, v {v}, past {past}"
        )
        require(
            q[0] == 1 and k[0] == 1 and (q[1], q[3]) == (k[1], k[3]),
            f"q {q} and k {k} are not of the same tokens",
        )
        require(k[2] > 0 and q[2] % k[2] == 0, f"{q[2]} heads do not share {k[2]}")
        require((past[0], past[2], past[4]) == (2, k[2], k[3]), f"past {past} does not fit k {k}")
        require(0 <= attrs["block"] < past[1], f"there is no block {attrs['block']} of {past[1]}")
        return [TensorType("f32", q)]

    @staticmethod
    def run(x: Operands, a: Attrs) -> list[Array]:
        """See the class."""
        q, k, v = (array(t)[0].transpose(1, 0, 2) for t in x[:3])
        past, count = array(x[3]), int(array(x[4])[0])
        require(0 <= count <= past.shape[3], f"{count} of {past.shape[3]} places")
        if q.size == 0:
            return [array(x[0])]
        keys, values = (
            np.concatenate([past[i, a["block"], :, :count], new], 1) for i, new in ((0, k), (1, v))
        )
        times, n = len(q) // max(len(k), 1), q.shape[1]
        keys, values = np.repeat(keys, times, 0), np.repeat(values, times, 0)
        s = (q @ keys.transpose(0, 2, 1)) * np.float32(a["factor"])
        later = np.arange(count + n)[None] > count + np.arange(n)[:, None]
        p = softmax_last(np.where(later, np.float32(-np.inf), s))
        return [(p @ values).transpose(1, 0, 2)[None].astype(np.float32)]

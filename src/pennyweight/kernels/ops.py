"""Declare the opaque ops and their shapes; run them on the engine, or on their reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pennyweight.kernels import native, recurrent, reference

_GEOMETRY = (
    "int[] shape, int[] stride, int[] padding, int[] dilation, int[] extra, int groups, bool transposed"
)

SCHEMAS = {
    "round_to_codes": "(Tensor x, Tensor scale, Tensor zero, int high=255, Tensor? levels=None) -> Tensor",
    "linear": "(Tensor x, Tensor codes, Tensor scale, Tensor? bias, Tensor x_scale, Tensor x_zero, "
    "Tensor? table=None) -> Tensor",
    "linear_binary": "(Tensor x, Tensor codes, Tensor scale, Tensor? bias, Tensor x_scale, int n) -> Tensor",
    "linear_dynamic": "(Tensor x, Tensor codes, Tensor scale, Tensor? bias, bool per_token, "
    "Tensor? table=None) -> Tensor",
    "linear_grouped": "(Tensor x, Tensor codes, Tensor scale, Tensor? bias, bool per_token, int bits, int n) -> Tensor",
    "linear_weight": "(Tensor x, Tensor codes, Tensor scale, Tensor? zero, Tensor? bias, int bits, int n) -> Tensor",
    "linear_levels": "(Tensor x, Tensor codes, Tensor levels, Tensor scale, Tensor? bias, int bits, int n) -> Tensor",
    "conv": "(Tensor x, Tensor codes, Tensor scale, Tensor? bias, Tensor x_scale, Tensor x_zero, "
    f"{_GEOMETRY}, Tensor? table=None) -> Tensor",
    "conv_binary": "(Tensor x, Tensor codes, Tensor scale, Tensor? bias, Tensor x_scale, "
    f"{_GEOMETRY}) -> Tensor",
    "conv_dynamic": "(Tensor x, Tensor codes, Tensor scale, Tensor? bias, "
    f"{_GEOMETRY}, Tensor? table=None) -> Tensor",
    "conv_weight": "(Tensor x, Tensor codes, Tensor scale, Tensor? zero, Tensor? bias, int bits, "
    f"{_GEOMETRY}) -> Tensor",
    "conv_levels": "(Tensor x, Tensor codes, Tensor levels, Tensor scale, Tensor? bias, int bits, "
    f"{_GEOMETRY}) -> Tensor",
    "matmul": "(Tensor a, Tensor b, Tensor a_scale, Tensor a_zero, Tensor b_scale, Tensor b_zero) -> Tensor",
    "attention": "(Tensor q, Tensor k, Tensor v, Tensor? mask, bool causal, float factor, Tensor q_scale, "
    "Tensor q_zero, Tensor k_scale, Tensor k_zero, Tensor v_scale, Tensor v_zero) -> Tensor",
    "past_attention": "(Tensor q, Tensor k, Tensor v, Tensor past, Tensor count, int block, float factor) -> Tensor",
    "past_attention_rounded": "(Tensor q, Tensor k, Tensor v, Tensor past, Tensor ranges, Tensor count, int block, "
    "float factor) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "hadamard": "(Tensor x, int size) -> Tensor",
    "embedding": "(Tensor ids, Tensor codes, Tensor scale, Tensor? zero, int bits, int n) -> Tensor",
    "decode": "(Tensor codes, Tensor scale, Tensor? zero, int bits, int n) -> Tensor",
    "decode_levels": "(Tensor codes, Tensor levels, Tensor scale, int bits, int n) -> Tensor",
    "lstm": "(Tensor x, Tensor h, Tensor c, Tensor w_ih, Tensor s_ih, Tensor w_hh, Tensor s_hh, Tensor? b_ih, "
    "Tensor? b_hh, bool reverse) -> (Tensor, Tensor, Tensor)",
    "gru": "(Tensor x, Tensor h, Tensor w_ih, Tensor s_ih, Tensor w_hh, Tensor s_hh, Tensor? b_ih, Tensor? b_hh, "
    "bool reverse) -> (Tensor, Tensor)",
}

_library = torch.library.Library("pennyweight", "DEF")


def conv_shape(
    size: Any, shape: list[int], stride: list[int], padding: list[int], dilation: list[int], extra: list[int],
    transposed: bool,
) -> list[Any]:  # fmt: skip
    """Spatial sizes of a convolution's result."""
    out = []
    for i, n in enumerate(size):
        span = dilation[i] * (shape[2 + i] - 1) + 1
        if transposed:
            out.append((n - 1) * stride[i] - 2 * padding[i] + span + extra[i])
        else:
            out.append((n + 2 * padding[i] - span) // stride[i] + 1)
    return out


def _fake_conv(x: Tensor, *args: Any) -> Tensor:
    first = next(i for i, a in enumerate(args) if isinstance(a, list | tuple))
    shape, stride, padding, dilation, extra, _groups, transposed = args[first : first + 7]
    return x.new_empty(
        [x.shape[0], shape[0], *conv_shape(x.shape[2:], shape, stride, padding, dilation, extra, transposed)]
    )


def _fake_matmul(a: Tensor, b: Tensor, *args: Any) -> Tensor:
    return torch.matmul(a, b)


def _fake_rounded(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, ...]:
    codes, ranges = (
        (k.new_empty(k.shape, dtype=torch.uint8) for _ in range(2)),
        (k.new_empty([*k.shape[:-1], 2]) for _ in range(2)),
    )
    return torch.empty_like(q), *codes, *ranges


def _fake_lstm(x: Tensor, h: Tensor, c: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty([*x.shape[:2], h.shape[1]]), torch.empty_like(h), torch.empty_like(c)


def _fake_gru(x: Tensor, h: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty([*x.shape[:2], h.shape[1]]), torch.empty_like(h)


FAKES: dict[str, Callable[..., Any]] = {
    "round_to_codes": lambda x, *a: torch.empty_like(x),
    "linear": lambda x, codes, *a: x.new_empty([*x.shape[:-1], codes.shape[0]]),
    "linear_binary": lambda x, codes, *a: x.new_empty([*x.shape[:-1], codes.shape[0]]),
    "linear_dynamic": lambda x, codes, *a: x.new_empty([*x.shape[:-1], codes.shape[0]]),
    "linear_grouped": lambda x, codes, *a: x.new_empty([*x.shape[:-1], codes.shape[0]]),
    "linear_weight": lambda x, codes, *a: x.new_empty([*x.shape[:-1], codes.shape[0]]),
    "linear_levels": lambda x, codes, *a: x.new_empty([*x.shape[:-1], codes.shape[0]]),
    "conv": _fake_conv,
    "conv_binary": _fake_conv,
    "conv_dynamic": _fake_conv,
    "conv_weight": _fake_conv,
    "conv_levels": _fake_conv,
    "matmul": _fake_matmul,
    "attention": lambda q, k, v, *a: q.new_empty([*q.shape[:-1], v.shape[-1]]),
    "past_attention": lambda q, *a: torch.empty_like(q),
    "past_attention_rounded": _fake_rounded,
    "hadamard": lambda x, *a: torch.empty_like(x),
    "embedding": lambda ids, codes, scale, zero, bits, n: scale.new_empty([*ids.shape, n]),
    "decode": lambda codes, scale, zero, bits, n: scale.new_empty([codes.shape[0], n]),
    "decode_levels": lambda codes, levels, scale, bits, n: scale.new_empty([codes.shape[0], n]),
    "lstm": _fake_lstm,
    "gru": _fake_gru,
}
REFERENCES: dict[str, Callable[..., Any]] = {**vars(reference), "lstm": recurrent.lstm, "gru": recurrent.gru}

for _name, _schema in SCHEMAS.items():
    _library.define(_name + _schema)
    _library.impl(_name, native.engine_op(_name, _schema, REFERENCES[_name]), "CompositeExplicitAutograd")
    torch.library.register_fake(f"pennyweight::{_name}", FAKES[_name], lib=_library)

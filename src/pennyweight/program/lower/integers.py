"""Lowering of our own opaque ops."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from pennyweight.errors import LowerError
from pennyweight.nn.packing import code_bits, pack_codes, unpack_codes
from pennyweight.program.lower.builder import Builder, Value, argument, handles, number


def quantized(b: Builder, x: Value, scale: Tensor, zero: Tensor, high: int = 255) -> tuple[Value, float, int]:
    """Codes of a value, with their scale and zero point."""
    s, z = number(scale), int(number(zero))
    q = b.emit("quantize", [x], scale=s, zero=z, lo=0, hi=high)
    return b.shaped(q, x.shape), s, z


def multipliers(x_scale: float, w_scale: Tensor) -> np.ndarray[Any, Any]:
    """`float32(float64(sx) * float64(sw))`, [O] or [1]."""
    return (np.float64(x_scale) * w_scale.double().numpy().reshape(-1)).astype(np.float32)


@handles("pennyweight.round_to_codes.default")
def _round(b: Builder, args: Any, kwargs: Any) -> Value:
    x = b.value(args[0])
    high = int(args[3]) if len(args) > 3 else 255
    q, scale, zero = quantized(b, x, b.stored_tensor(args[1]), b.stored_tensor(args[2]), high)
    levels = argument(args, kwargs, 4, "levels")
    if levels is not None:
        q = b.shaped(b.emit("table", [q, b.value(levels)]), x.shape)
    return b.shaped(b.emit("dequantize", [q], scale=scale, zero=zero), x.shape)


def biases(b: Builder, bias: Any) -> tuple[Value | None, list[Value]]:
    """A bias on the accumulator's scale joins the product, a float one the rescaling."""
    if bias is None:
        return None, []
    value = b.value(bias)
    return (value, []) if value.dtype == "i32" else (None, [value])


@handles("pennyweight.linear.default")
def _linear(b: Builder, args: Any, kwargs: Any) -> Value:
    x, codes, scale, bias, x_scale, x_zero = args[:6]
    q, sx, zx = quantized(b, b.value(x), b.stored_tensor(x_scale), b.stored_tensor(x_zero))
    before, after = biases(b, bias)
    acc = b.emit(
        "linear", [q, linear_codes(b, q, codes, argument(args, kwargs, 6, "table")), before], zero=zx
    )
    m = b.constant(multipliers(sx, b.stored_tensor(scale)), f"{b.site}.multiplier")
    return b.emit("rescale", [acc, m, *after])


@handles("pennyweight.linear_dynamic.default")
def _linear_dynamic(b: Builder, args: Any, kwargs: Any) -> Value:
    x, codes, scale, bias, per_token = args[:5]
    q, row, zero = b.emit_all("dynamic_quantize", [b.value(x)], per_token=bool(per_token))
    weight = linear_codes(b, q, codes, argument(args, kwargs, 5, "table"))
    acc = b.emit("linear", [q, weight, None, zero], zero=0)
    return b.emit("rescale", [acc, b.value(scale), None if bias is None else b.value(bias), row])


def linear_codes(b: Builder, x: Value, codes: Any, table: Any) -> Value:
    """The weight [O, I] of a linear layer on x [..., I]: int8 as stored, or unpacked by its table."""
    if table is None:
        return b.value(codes)
    return unpacked(
        b, codes.name, b.stored_tensor(codes), table, [codes.tensor.shape[0], b.type_of(x).ints[-1]]
    )


def unpacked(b: Builder, name: str, codes: Tensor, table: Any, shape: list[int]) -> Value:
    """A weight of stored codes of a few bits; tables of rows are that of the first and zero points beside it."""
    levels = b.stored_tensor(table)
    operands = [b.constant(codes, name)]
    if levels.ndim == 1:
        operands.append(b.value(table))
    else:
        operands.append(b.constant(levels[0], table.name))
        operands.append(b.constant(levels[0, 0] - levels[:, 0], f"{table.name}.zero"))
    return b.emit("unpack", operands, bits=code_bits(levels), shape=[int(n) for n in shape])


def conv_codes(
    b: Builder, x: Value, codes: Any, geometry: Any, table: Any, fill: Any
) -> tuple[Value, Value, dict[str, Any]]:
    """As `conv_geometry`, for stored codes; packed ones are laid out as the plain convolution wants them."""
    if table is None:
        x, weight, attrs = conv_geometry(b, x, b.stored_tensor(codes), geometry, fill)
        return x, b.constant(weight, codes.name), attrs
    bits, n = code_bits(b.stored_tensor(table)), int(np.prod(geometry[0][1:]))
    places = unpack_codes(b.stored_tensor(codes), bits, n)
    x, weight, attrs = conv_geometry(b, x, places, geometry, fill)
    return x, unpacked(b, codes.name, pack_codes(weight.flatten(1), bits), table, list(weight.shape)), attrs


@handles("pennyweight.linear_grouped.default")
def _linear_grouped(b: Builder, args: Any, kwargs: Any) -> Value:
    x, codes, scale, bias, per_token, bits, n = args
    q, row, zero = b.emit_all("dynamic_quantize", [b.value(x)], per_token=bool(per_token))
    half = b.stored_tensor(scale).half()
    small = torch.equal(half.float(), b.stored_tensor(scale))  # the file then says every scale in 16 bits
    scales = b.constant(half, scale.name) if small else b.value(scale)
    operands: list[Value | None] = [q, stored_codes(b, codes, bits), scales, zero, row]
    operands += [] if bias is None else [b.value(bias)]
    return b.emit("linear_grouped", operands, bits=bits, n=n)


def stored_codes(b: Builder, codes: Any, bits: int) -> Value:
    """Codes as a constant, packed nibbles marked as such."""
    tensor = b.stored_tensor(codes)
    return b.constant(tensor, codes.name, "u4" if bits == 4 else "i8")


@handles("pennyweight.linear_weight.default")
def _linear_weight(b: Builder, args: Any, kwargs: Any) -> Value:
    x, codes, scale, zero, bias, bits, n = args
    operands: list[Value | None] = [b.value(x), stored_codes(b, codes, bits), b.value(scale)]
    operands += [None if v is None else b.value(v) for v in (zero, bias)]
    return b.emit("linear_w", operands, bits=bits, n=n)


@handles("pennyweight.embedding.default")
def _embedding(b: Builder, args: Any, kwargs: Any) -> Value:
    ids, codes, scale, zero, bits, n = args
    operands = [b.value(ids), stored_codes(b, codes, bits), b.value(scale)]
    operands += [] if zero is None else [b.value(zero)]
    return b.emit("embedding", operands, bits=bits, n=n)


def conv_geometry(
    b: Builder, x: Value, weight: Tensor, args: Any, fill: Any
) -> tuple[Value, Tensor, dict[str, Any]]:
    """Input [N, *space, C], weight [O, C / groups, *kernel] and attributes of a convolution, transposed or not.

    A transposed convolution is the plain one over an input stuffed with zeros, with the kernel turned round.
    """
    shape, stride, padding, dilation, extra, groups, transposed = args
    dims = len(stride)
    weight = weight.reshape(shape)
    if not transposed:
        attrs = {
            "stride": list(stride),
            "pads": [*padding, *padding],
            "dilation": list(dilation),
            "groups": groups,
        }
        return x, weight, attrs
    begin = [dilation[i] * (shape[2 + i] - 1) - padding[i] for i in range(dims)]
    if min(begin) < 0:
        raise LowerError(
            "a transposed convolution that crops more than its kernel", site=b.site, hint=b.where
        )
    if any(s > 1 for s in stride):
        x = b.emit("stuff", [x], factors=[1, *stride, 1], value=fill)
    pads = [*begin, *(begin[i] + extra[i] for i in range(dims))]
    weight = weight.flip(list(range(2, 2 + dims))).contiguous()
    return x, weight, {"stride": [1] * dims, "pads": pads, "dilation": list(dilation), "groups": groups}


@handles("pennyweight.conv.default")
def _conv(b: Builder, args: Any, kwargs: Any) -> Value:
    x, codes, scale, bias, x_scale, x_zero = args[:6]
    last = b.channels_last(b.value(x))
    q, sx, zx = quantized(b, last, b.stored_tensor(x_scale), b.stored_tensor(x_zero))
    q, weight, attrs = conv_codes(b, q, codes, args[6:13], argument(args, kwargs, 13, "table"), zx)
    before, after = biases(b, bias)
    acc = b.emit("conv", [q, weight, before], zero=zx, **attrs)
    m = b.constant(multipliers(sx, b.stored_tensor(scale)), f"{b.site}.multiplier")
    return b.channels_first(b.emit("rescale", [acc, m, *after]))


def signed(b: Builder, x: Value, groups: int) -> Value:
    """Bits of a value: 1 where it is 0 or more."""
    zero = b.constant(np.zeros(1, np.float32), "zero_threshold")
    bits = b.emit("sign", [x, zero], groups=groups)
    return b.shaped(bits, [*x.shape[:-1], bits.shape[-1]])


@handles("pennyweight.linear_binary.default")
def _linear_binary(b: Builder, args: Any, kwargs: Any) -> Value:
    x, codes, scale, bias, x_scale, n = args
    acc = b.emit("linear_binary", [signed(b, b.value(x), 1), b.value(codes)], n=int(n))
    m = multipliers(number(b.stored_tensor(x_scale)), b.stored_tensor(scale))
    rest = [] if bias is None else [b.value(bias)]
    return b.emit("rescale", [acc, b.constant(m, f"{b.site}.multiplier"), *rest])


@handles("pennyweight.conv_binary.default")
def _conv_binary(b: Builder, args: Any, kwargs: Any) -> Value:
    x, codes, scale, bias, x_scale, shape, stride, padding, dilation, _, groups, _ = args
    attrs = {
        "shape": list(shape),
        "stride": list(stride),
        "pads": [*padding, *padding],
        "dilation": list(dilation),
        "groups": groups,
    }
    bits = signed(b, b.channels_last(b.value(x)), groups)
    acc = b.emit("conv_binary", [bits, b.value(codes)], **attrs)
    m = multipliers(number(b.stored_tensor(x_scale)), b.stored_tensor(scale))
    rest = [] if bias is None else [b.value(bias)]
    return b.channels_first(b.emit("rescale", [acc, b.constant(m, f"{b.site}.multiplier"), *rest]))


@handles("pennyweight.conv_dynamic.default")
def _conv_dynamic(b: Builder, args: Any, kwargs: Any) -> Value:
    x, codes, scale, bias = args[:4]
    # zeros of a transposed convolution are stuffed before they are ranged: every range holds zero
    table = argument(args, kwargs, 11, "table")
    last, weight, attrs = conv_codes(b, b.channels_last(b.value(x)), codes, args[4:11], table, 0.0)
    q, row, zero = b.emit_all("dynamic_quantize", [last], per_token=False)
    acc = b.emit("conv", [q, weight, None, zero], zero=0, **attrs)
    return b.channels_first(
        b.emit("rescale", [acc, b.value(scale), None if bias is None else b.value(bias), row])
    )


@handles("pennyweight.conv_weight.default")
def _conv_weight(b: Builder, args: Any, kwargs: Any) -> Value:
    x, codes, scale, zero, bias, bits = args[:6]
    stored = turned(b, codes, scale, bits, args[6:])
    operands = [b.constant(stored, codes.name, "u4" if bits == 4 else "i8"), b.value(scale)]
    return _float_conv(
        b, x, "decode", [*operands, *([] if zero is None else [b.value(zero)])], bias, bits, args[6:]
    )


@handles("pennyweight.conv_levels.default")
def _conv_levels(b: Builder, args: Any, kwargs: Any) -> Value:
    x, codes, levels, scale, bias, bits = args[:6]
    stored = turned(b, codes, scale, bits, args[6:])
    operands = [b.constant(stored, codes.name, "u4" if bits == 4 else "u8"), b.value(levels), b.value(scale)]
    return _float_conv(b, x, "decode_levels", operands, bias, bits, args[6:])


def turned(b: Builder, codes: Any, scale: Any, bits: int, geometry: Any) -> Tensor:
    """Stored codes [O, n], those of a transposed convolution with the kernel turned round."""
    shape, stored = list(geometry[0]), b.stored_tensor(codes)
    if not geometry[-1]:
        return stored
    if b.stored_tensor(scale).shape[1] > 1:
        raise LowerError(
            "a transposed convolution needs one scale per row", site=b.site, hint="Use int4[1,*]."
        )
    n = int(np.prod(shape[1:]))
    rows = (unpack_codes(stored, bits, n) if bits == 4 else stored).reshape(shape)
    rows = rows.flip(list(range(2, len(shape)))).flatten(1).contiguous()
    return pack_codes(rows, bits) if bits == 4 else rows


def _float_conv(
    b: Builder, x: Any, decoder: str, operands: list[Value], bias: Any, bits: int, geometry: Any
) -> Value:
    shape = list(geometry[0])
    weight = b.emit(decoder, operands, bits=bits, shape=shape)
    last, _, attrs = conv_geometry(
        b, b.channels_last(b.value(x)), torch.empty(shape, device="meta"), geometry, 0.0
    )
    y = b.emit("conv_f32", [last, weight, None if bias is None else b.value(bias)], **attrs)
    return b.channels_first(y)


@handles("pennyweight.decode.default")
def _decode(b: Builder, args: Any, kwargs: Any) -> Value:
    codes, scale, zero, bits, n = args
    operands = [stored_codes(b, codes, bits), widened(b, scale), *([] if zero is None else [b.value(zero)])]
    return b.emit("decode", operands, bits=bits, shape=[int(codes.tensor.shape[0]), n])


@handles("pennyweight.decode_levels.default")
def _decode_levels(b: Builder, args: Any, kwargs: Any) -> Value:
    codes, levels, scale, bits, n = args
    stored = b.stored_tensor(codes)
    operands = [b.constant(stored, codes.name, "u4" if bits == 4 else "u8"), b.value(levels), b.value(scale)]
    return b.emit("decode_levels", operands, bits=bits, shape=[int(stored.shape[0]), n])


@handles("pennyweight.linear_levels.default")
def _linear_levels(b: Builder, args: Any, kwargs: Any) -> Value:
    x, codes, levels, scale, bias, bits, n = args
    weight = _decode_levels(b, (codes, levels, scale, bits, n), {})
    return b.emit("linear_f32", [b.value(x), weight, None if bias is None else b.value(bias)])


def widened(b: Builder, x: Any) -> Value:
    """A value, cast to f32 if it is stored in 16 bits."""
    value = b.value(x)
    return b.emit("cast", [value], dtype="f32") if value.dtype in ("f16", "bf16") else value


@handles("pennyweight.matmul.default")
def _matmul(b: Builder, args: Any, kwargs: Any) -> Value:
    x, y, x_scale, x_zero, y_scale, y_zero = args
    qa, sa, za = quantized(b, b.value(x), b.stored_tensor(x_scale), b.stored_tensor(x_zero))
    qb, sb, zb = quantized(b, b.value(y), b.stored_tensor(y_scale), b.stored_tensor(y_zero))
    acc = b.emit("matmul", [qa, qb], a_zero=za, b_zero=zb, transpose_b=False)
    m = b.constant(np.asarray([np.float64(sa) * np.float64(sb)], np.float32), f"{b.site}.multiplier")
    return b.emit("rescale", [acc, m])


@handles("pennyweight.attention.default")
def _attention(b: Builder, args: Any, kwargs: Any) -> Value:
    q, k, v, mask, causal, factor = args[:6]
    qs, ks, vs = (args[6 + 2 * i : 8 + 2 * i] for i in range(3))
    qq, sq, zq = quantized(b, b.value(q), b.stored_tensor(qs[0]), b.stored_tensor(qs[1]))
    qk, sk, zk = quantized(b, b.value(k), b.stored_tensor(ks[0]), b.stored_tensor(ks[1]))
    qv, sv, zv = quantized(b, b.value(v), b.stored_tensor(vs[0]), b.stored_tensor(vs[1]))
    if mask is not None:
        mask = float_mask(b, b.value(mask))
    scale = float(np.float32(np.float64(sq) * np.float64(sk) * factor))
    operands = [qq, qk, qv] + ([] if mask is None else [mask])
    acc = b.emit("attention", operands, q_zero=zq, k_zero=zk, v_zero=zv, factor=scale, causal=bool(causal))
    m = b.constant(np.asarray([np.float64(sv) / 255.0], np.float32), f"{b.site}.multiplier")
    return b.emit("rescale", [acc, m])


@handles("pennyweight.hadamard.default")
def _hadamard(b: Builder, args: Any, kwargs: Any) -> Value:
    return b.emit("hadamard", [b.value(args[0])], size=int(args[1]))


@handles("pennyweight.past_attention.default")
def _past_attention(b: Builder, args: Any, kwargs: Any) -> Value:
    *operands, block, factor = args
    return b.emit("past_attention", [b.value(v) for v in operands], block=int(block), factor=float(factor))


@handles("pennyweight.past_attention_rounded.default")
def _past_attention_rounded(b: Builder, args: Any, kwargs: Any) -> Any:
    q, k, v, past, ranges, count, block, factor = args
    parts = [b.emit_all("dynamic_quantize", [b.value(x)], per_token=True) for x in (k, v)]
    operands = [
        b.value(q),
        *(p for c, s, z in parts for p in (c, s, z)),
        b.value(past),
        b.value(ranges),
        b.value(count),
    ]
    y = b.emit("past_attention_q", operands, block=int(block), factor=float(factor))
    spans = [b.emit("concat", [s, b.emit("cast", [z], dtype="f32")], axis=3) for _, s, z in parts]
    return [y, *(c for c, _, _ in parts), *spans]


def float_mask(b: Builder, mask: Value) -> Value:
    """A boolean mask (True: keep) as an additive one; a float mask as it is."""
    if mask.dtype != "bool":
        return mask
    zero = b.constant(np.asarray(0.0, np.float32), "zero")
    low = b.constant(np.asarray(-np.inf, np.float32), "minus_infinity")
    return b.emit("where", [mask, zero, low])


@handles("pennyweight.lstm.default")
def _lstm(b: Builder, args: Any, kwargs: Any) -> Any:
    *tensors, reverse = args
    return b.emit_all("lstm", [None if t is None else widened(b, t) for t in tensors], reverse=bool(reverse))


@handles("pennyweight.gru.default")
def _gru(b: Builder, args: Any, kwargs: Any) -> Any:
    *tensors, reverse = args
    return b.emit_all("gru", [None if t is None else widened(b, t) for t in tensors], reverse=bool(reverse))

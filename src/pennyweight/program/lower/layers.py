"""Lowering of torch layers that stay in float, of pools and of attention."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from pennyweight.errors import LowerError
from pennyweight.nn.calls import bind_layer
from pennyweight.program.lower.activations import as_float, unary
from pennyweight.program.lower.builder import Builder, Value, argument, handles
from pennyweight.program.lower.integers import conv_geometry, float_mask


@handles("aten.linear.default")
def _linear(b: Builder, args: Any, kwargs: Any) -> Value:
    bias = argument(args, kwargs, 2, "bias")
    operands = [b.value(args[0]), b.value(args[1]), None if bias is None else b.value(bias)]
    return b.emit("linear_f32", operands)


@handles("aten.addmm.default")
def _addmm(b: Builder, args: Any, kwargs: Any) -> Value:
    product = b.emit("matmul_f32", [b.value(args[1]), b.value(args[2])], transpose_b=False)
    return b.emit("binary", [product, b.value(args[0])], fn="add")


def _conv(b: Builder, x: Any, weight: Any, bias: Any, geometry: list[Any]) -> Value:
    value = b.value(x)
    dims = value.rank - 2
    stride, padding, dilation, transposed, extra, groups = geometry
    stride, dilation, extra = (_spread(v, dims) for v in (stride, dilation, extra))
    tensor = b.stored_tensor(weight)
    shape = list(tensor.shape)
    if isinstance(padding, str):
        padding = (
            [0] * dims
            if padding == "valid"
            else [d * (k - 1) // 2 for d, k in zip(dilation, shape[2:], strict=True)]
        )
    padding = _spread(padding, dims)
    last = b.channels_last(value)
    if transposed:
        tensor = tensor.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
        shape = list(tensor.shape)
    last, tensor, attrs = conv_geometry(
        b, last, tensor, (shape, stride, padding, dilation, extra, groups, transposed), 0.0
    )
    operands = [last, b.constant(tensor, weight.name), None if bias is None else b.value(bias)]
    return b.channels_first(b.emit("conv_f32", operands, **attrs))


def _spread(v: Any, dims: int) -> list[int]:
    values = [v] if isinstance(v, int) else list(v)
    return values * dims if len(values) == 1 else values


@handles(
    "aten.conv1d.default",
    "aten.conv2d.default",
    "aten.conv3d.default",
    "aten.conv1d.padding",
    "aten.conv2d.padding",
)
def _plain_conv(b: Builder, args: Any, kwargs: Any) -> Value:
    x, weight, bias, stride, padding, dilation, groups = bind_layer("conv", args, kwargs)
    return _conv(b, x, weight, bias, [stride, padding, dilation, False, 0, groups])


@handles("aten.conv_transpose1d.default", "aten.conv_transpose2d.input", "aten.conv_transpose3d.input")
def _transposed_conv(b: Builder, args: Any, kwargs: Any) -> Value:
    x, weight, bias, stride, padding, extra, groups, dilation = bind_layer("conv_transpose", args, kwargs)
    return _conv(b, x, weight, bias, [stride, padding, dilation, True, extra, groups])


@handles("aten.convolution.default")
def _convolution(b: Builder, args: Any, kwargs: Any) -> Value:
    x, weight, bias, stride, padding, dilation, transposed, extra, groups = args
    return _conv(b, x, weight, bias, [stride, padding, dilation, transposed, extra, groups])


@handles("aten.batch_norm.default", "aten._native_batch_norm_legit_no_training.default")
def _batch_norm(b: Builder, args: Any, kwargs: Any) -> Any:
    """`y = x * (g / sqrt(v + eps)) + (beta - mean * g / sqrt(v + eps))`."""
    legit = "no_training" in str(kwargs.node.target)
    x, weight, bias, mean, var = args[:5]
    eps = args[6] if legit else args[7]
    mean, var = (b.stored_tensor(t).double() for t in (mean, var))
    gain = (1.0 if weight is None else b.stored_tensor(weight).double()) / torch.sqrt(var + eps)
    shift = (0.0 if bias is None else b.stored_tensor(bias).double()) - mean * gain
    value = b.value(x)
    shape = [1, -1, *[1] * (value.rank - 2)]
    scaled = b.emit("binary", [value, b.constant(gain.float().reshape(shape), f"{b.site}.gain")], fn="mul")
    y = b.emit("binary", [scaled, b.constant(shift.float().reshape(shape), f"{b.site}.shift")], fn="add")
    return [y, None, None] if legit else y


@handles("aten.layer_norm.default")
def _layer_norm(b: Builder, args: Any, kwargs: Any) -> Value:
    x, sizes = b.value(args[0]), list(args[1])
    weight, bias = argument(args, kwargs, 2, "weight"), argument(args, kwargs, 3, "bias")
    eps = argument(args, kwargs, 4, "eps", 1e-5)
    parameters = [None if p is None else b.value(p) for p in (weight, bias)]
    if len(sizes) == 1:
        return b.emit("layer_norm", [x, *parameters], eps=float(eps))
    lead = list(x.shape[: x.rank - len(sizes)])
    flat = b.emit("reshape", [x], shape=[*lead, math.prod(sizes)])
    flattened = [None if p is None else b.emit("reshape", [p], shape=[math.prod(sizes)]) for p in parameters]
    y = b.emit("layer_norm", [flat, *flattened], eps=float(eps))
    return b.emit("reshape", [y], shape=[*lead, *sizes])


@handles("aten.group_norm.default")
def _group_norm(b: Builder, args: Any, kwargs: Any) -> Value:
    x, groups = b.value(args[0]), args[1]
    weight, bias = argument(args, kwargs, 2, "weight"), argument(args, kwargs, 3, "bias")
    eps = argument(args, kwargs, 4, "eps", 1e-5)
    flat = b.emit("reshape", [x], shape=[x.shape[0], groups, -1])
    y = b.emit("reshape", [b.emit("layer_norm", [flat, None, None], eps=float(eps))], shape=list(x.shape))
    for p, fn in ((weight, "mul"), (bias, "add")):
        if p is not None:
            c = b.constant(b.stored_tensor(p).reshape(1, -1, *[1] * (x.rank - 2)), f"{b.site}.{fn}")
            y = b.emit("binary", [y, c], fn=fn)
    return y


@handles("aten.rms_norm.default")
def _rms_norm(b: Builder, args: Any, kwargs: Any) -> Value:
    x, sizes = b.value(args[0]), args[1]
    weight, eps = (
        argument(args, kwargs, 2, "weight"),
        argument(args, kwargs, 3, "eps") or torch.finfo(torch.float32).eps,
    )
    if len(sizes) != 1:
        raise LowerError("rms_norm over several axes has no program form", site=b.site, hint=b.where)
    return b.emit("rms_norm", [x, None if weight is None else b.value(weight)], eps=float(eps))


@handles("aten.softmax.int", "aten._softmax.default", "aten._safe_softmax.default")
def _softmax(b: Builder, args: Any, kwargs: Any) -> Value:
    x = as_float(b, b.value(args[0]))
    axis = args[1] % x.rank
    perm = [i for i in range(x.rank) if i != axis] + [axis]
    back = [perm.index(i) for i in range(x.rank)]
    y = x if axis == x.rank - 1 else b.emit("transpose", [x], perm=perm)
    y = b.emit("softmax", [y])
    return y if axis == x.rank - 1 else b.emit("transpose", [y], perm=back)


@handles("aten.log_softmax.int", "aten._log_softmax.default")
def _log_softmax(b: Builder, args: Any, kwargs: Any) -> Value:
    return unary(b, _softmax(b, args, kwargs), "log")


@handles("aten.matmul.default", "aten.bmm.default", "aten.mm.default")
def _matmul(b: Builder, args: Any, kwargs: Any) -> Value:
    x, y = b.value(args[0]), b.value(args[1])
    if x.rank == 1 or y.rank == 1:
        x2 = b.emit("reshape", [x], shape=[1, x.shape[0]]) if x.rank == 1 else x
        y2 = b.emit("reshape", [y], shape=[y.shape[0], 1]) if y.rank == 1 else y
        z = b.emit("matmul_f32", [x2, y2], transpose_b=False)
        return b.emit("reshape", [z], shape=b.dims(kwargs.node.meta["val"].shape))
    return b.emit("matmul_f32", [x, y], transpose_b=False)


@handles("aten.scaled_dot_product_attention.default")
def _attention(b: Builder, args: Any, kwargs: Any) -> Value:
    q, k, v = (b.value(a) for a in args[:3])
    mask = argument(args, kwargs, 3, "attn_mask")
    causal, scale = argument(args, kwargs, 5, "is_causal", False), kwargs.get("scale")
    if kwargs.get("enable_gqa"):
        raise LowerError("grouped-query attention by flag has no program form", site=b.site, hint=b.where)
    scale = 1 / math.sqrt(int(q.shape[-1])) if scale is None else scale
    scores = unary(b, b.emit("matmul_f32", [q, k], transpose_b=True), "mul", scale)
    if causal:
        rows = b.emit(
            "reshape", [b.emit("iota", [], size=q.shape[-2], step=1, start=0)], shape=[q.shape[-2], 1]
        )
        columns = b.emit("iota", [], size=k.shape[-2], step=1, start=0)
        keep = b.emit("binary", [columns, rows], fn="le")
        scores = b.emit("binary", [scores, float_mask(b, keep)], fn="add")
    if mask is not None:
        scores = b.emit("binary", [scores, float_mask(b, b.value(mask))], fn="add")
    shares = b.emit("softmax", [scores])
    if b.made_from(v) == "bf16":  # values were rounded: their factors are too
        shares = b.emit("cast", [b.emit("cast", [shares], dtype="bf16")], dtype="f32")
    return b.emit("matmul_f32", [shares, v], transpose_b=False)


@handles("aten.embedding.default")
def _embedding(b: Builder, args: Any, kwargs: Any) -> Value:
    return b.emit("gather", [b.value(args[0]), b.value(args[1])], axis=0)


# -- pools ----------------------------------------------------------------------------------------------------------


def _ceil_pads(
    sizes: Any, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int]
) -> list[int]:
    """End padding that makes a floor-mode pool give the ceil-mode size."""
    out = []
    for n, k, s, p, d in zip(sizes, kernel, stride, padding, dilation, strict=True):
        span = d * (k - 1) + 1
        size = -(-(n + 2 * p - span) // s) + 1
        if (size - 1) * s >= n + p:
            size -= 1
        out.append(max(p, (size - 1) * s + span - n - p))
    return out


@handles("aten.max_pool1d.default", "aten.max_pool2d.default", "aten.max_pool3d.default")
def _max_pool(b: Builder, args: Any, kwargs: Any) -> Value:
    x = b.value(args[0])
    dims = x.rank - 2
    kernel = _spread(args[1], dims)
    stride = _spread(argument(args, kwargs, 2, "stride") or kernel, dims)
    padding, dilation = (
        _spread(argument(args, kwargs, 3, "padding", 0), dims),
        _spread(argument(args, kwargs, 4, "dilation", 1), dims),
    )
    end = padding
    if argument(args, kwargs, 5, "ceil_mode", False):
        end = _ceil_pads(b.type_of(x).ints[2:], kernel, stride, padding, dilation)
    attrs = {"kernel": kernel, "stride": stride, "pads": [*padding, *end], "dilation": dilation}
    return b.channels_first(b.emit("max_pool", [b.channels_last(x)], **attrs))


@handles("aten.max_pool2d_with_indices.default")
def _max_pool_indices(b: Builder, args: Any, kwargs: Any) -> Any:
    return [_max_pool(b, args, kwargs), None]


@handles("aten.avg_pool1d.default", "aten.avg_pool2d.default", "aten.avg_pool3d.default")
def _avg_pool(b: Builder, args: Any, kwargs: Any) -> Value:
    x = b.value(args[0])
    dims = x.rank - 2
    kernel = _spread(args[1], dims)
    stride = _spread(argument(args, kwargs, 2, "stride") or kernel, dims)
    padding = _spread(argument(args, kwargs, 3, "padding", 0), dims)
    ceil, count = (
        argument(args, kwargs, 4, "ceil_mode", False),
        argument(args, kwargs, 5, "count_include_pad", True),
    )
    if argument(args, kwargs, 6, "divisor_override"):
        raise LowerError("avg_pool with a divisor of its own has no program form", site=b.site, hint=b.where)
    end = _ceil_pads(b.type_of(x).ints[2:], kernel, stride, padding, [1] * dims) if ceil else padding
    if end != padding and count and any(padding):
        raise LowerError(
            "avg_pool in ceil mode that counts padding has no program form", site=b.site, hint=b.where
        )
    counted = bool(count) and end == padding
    attrs = {"kernel": kernel, "stride": stride, "pads": [*padding, *end], "count_pads": counted}
    return b.channels_first(b.emit("avg_pool", [b.channels_last(x)], **attrs))


@handles(
    "aten.adaptive_avg_pool1d.default", "aten.adaptive_avg_pool2d.default", "aten.adaptive_avg_pool3d.default",
    "aten._adaptive_avg_pool2d.default",
)  # fmt: skip
def _adaptive_pool(b: Builder, args: Any, kwargs: Any) -> Value:
    x = b.value(args[0])
    sizes, wanted = b.type_of(x).ints[2:], _spread(args[1], x.rank - 2)
    wanted = [n if w is None else w for n, w in zip(sizes, wanted, strict=True)]
    if all(w == 1 for w in wanted):
        return b.emit("reduce", [x], fn="mean", axes=list(range(2, x.rank)), keepdims=True)
    if any(n % w for n, w in zip(sizes, wanted, strict=True)):
        raise LowerError(f"adaptive pooling of {sizes} to {wanted} is uneven", site=b.site, hint=b.where)
    kernel = [n // w for n, w in zip(sizes, wanted, strict=True)]
    attrs = {"kernel": kernel, "stride": kernel, "pads": [0] * 2 * len(kernel), "count_pads": True}
    return b.channels_first(b.emit("avg_pool", [b.channels_last(x)], **attrs))


@handles(
    "aten.mean.dim",
    "aten.sum.dim_IntList",
    "aten.amax.default",
    "aten.amin.default",
    "aten.mean.default",
    "aten.sum.default",
)
def _reduce(b: Builder, args: Any, kwargs: Any) -> Value:
    fn = {"mean": "mean", "sum": "sum", "amax": "max", "amin": "min"}[str(kwargs.node.target).split(".")[1]]
    x = b.value(args[0])
    axes = (
        argument(args, kwargs, 1, "dim")
        if str(kwargs.node.target).split(".")[2] != "default" or fn in ("max", "min")
        else None
    )
    axes = list(range(x.rank)) if not axes and axes != 0 else [axes] if isinstance(axes, int) else list(axes)
    keep = bool(argument(args, kwargs, 2, "keepdim", False))
    x = x if x.dtype in ("f32", "i64") else b.emit("cast", [x], dtype="i64" if fn == "sum" else "f32")
    if fn == "mean":
        x = as_float(b, x)
    return b.emit("reduce", [x], fn=fn, axes=[a % x.rank for a in axes], keepdims=keep)


@handles("aten.linalg_vector_norm.default", "aten.norm.ScalarOpt_dim")
def _norm(b: Builder, args: Any, kwargs: Any) -> Value:
    x, order = b.value(args[0]), argument(args, kwargs, 1, "ord", 2)
    axes, keep = argument(args, kwargs, 2, "dim"), bool(argument(args, kwargs, 3, "keepdim", False))
    if order not in (2, 2.0):
        raise LowerError(f"a norm of order {order} has no program form", site=b.site, hint=b.where)
    axes = list(range(x.rank)) if axes is None else [axes] if isinstance(axes, int) else list(axes)
    total = b.emit(
        "reduce", [unary(b, x, "square")], fn="sum", axes=[a % x.rank for a in axes], keepdims=keep
    )
    return unary(b, total, "sqrt")


@handles("aten.argmax.default")
def _argmax(b: Builder, args: Any, kwargs: Any) -> Value:
    x, axis = b.value(args[0]), argument(args, kwargs, 1, "dim")
    if axis is None:
        return b.emit("argmax", [b.emit("reshape", [x], shape=[-1])], axis=0, keepdims=False)
    return b.emit(
        "argmax", [x], axis=axis % x.rank, keepdims=bool(argument(args, kwargs, 2, "keepdim", False))
    )


@handles(
    "aten.upsample_nearest2d.vec",
    "aten.upsample_nearest2d.default",
    "aten.upsample_nearest1d.vec",
    "aten.upsample_nearest3d.vec",
)
def _nearest(b: Builder, args: Any, kwargs: Any) -> Value:
    x = b.value(args[0])
    out, have = [int(s) for s in kwargs.node.meta["val"].shape[2:]], b.type_of(x).ints[2:]
    if all(o % n == 0 for o, n in zip(out, have, strict=True)):
        return b.emit("upsample", [x], repeats=[1, 1, *(o // n for o, n in zip(out, have, strict=True))])
    for axis, (o, n) in enumerate(zip(out, have, strict=True)):
        index = np.minimum(np.floor(np.arange(o) * np.float32(n / o)).astype(np.int64), n - 1)
        x = b.emit("gather", [x, b.constant(index, f"{b.site}.index")], axis=2 + axis)
    return x


@handles("aten.upsample_bilinear2d.vec", "aten.upsample_bilinear2d.default")
def _bilinear(b: Builder, args: Any, kwargs: Any) -> Value:
    """Two products with interpolation matrices, one per axis."""
    x, corners = b.value(args[0]), bool(args[2])
    out, have = [int(s) for s in kwargs.node.meta["val"].shape[2:]], b.type_of(x).ints[2:]
    rows, columns = (_interpolation(n, o, corners) for n, o in zip(have, out, strict=True))
    y = b.emit("matmul_f32", [x, b.constant(columns, f"{b.site}.columns")], transpose_b=True)  # [N, C, H, W']
    return b.emit("matmul_f32", [b.constant(rows, f"{b.site}.rows"), y], transpose_b=False)


def _interpolation(n: int, out: int, corners: bool) -> Any:
    """Matrix [out, n] of linear interpolation, as torch places the samples."""
    if corners:
        place = np.arange(out) * ((n - 1) / max(out - 1, 1))
    else:
        place = np.maximum((np.arange(out) + 0.5) * (n / out) - 0.5, 0)
    low = np.minimum(np.floor(place).astype(int), n - 1)
    high = np.minimum(low + 1, n - 1)
    share = (place - low).astype(np.float32)
    matrix = np.zeros((out, n), np.float32)
    np.add.at(matrix, (np.arange(out), low), 1 - share)
    np.add.at(matrix, (np.arange(out), high), share)
    return matrix

"""Lowering of elementwise torch ops."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from pennyweight.errors import LowerError
from pennyweight.program.lower.builder import _DTYPES, Builder, Value, argument, handlers, handles

PLAIN = {
    "neg": "neg", "abs": "abs", "sqrt": "sqrt", "rsqrt": "rsqrt", "exp": "exp", "sigmoid": "sigmoid", "tanh": "tanh",
    "erf": "erf", "silu": "silu", "hardswish": "hardswish", "hardsigmoid": "hardsigmoid", "log": "log", "sin": "sin",
    "cos": "cos", "floor": "floor", "ceil": "ceil", "round": "rint", "square": "square", "sign": "sign", "mish": "mish",
    "softplus": "softplus", "selu": "selu",
}  # fmt: skip
BINARY = {
    "add": "add", "sub": "sub", "mul": "mul", "div": "div", "minimum": "min", "maximum": "max", "eq": "eq", "ne": "ne",
    "lt": "lt", "le": "le", "gt": "gt", "ge": "ge", "pow": "pow", "logical_and": "and", "logical_or": "or",
    "bitwise_and": "and", "bitwise_or": "or", "floor_divide": "floordiv", "remainder": "mod",
}  # fmt: skip


def unary(b: Builder, x: Value, fn: str, p: float = 0.0, q: float = 0.0) -> Value:
    """A unary op, same sizes."""
    return b.shaped(b.emit("unary", [as_float(b, x)], fn=fn, p=float(p), q=float(q)), x.shape)


def as_float(b: Builder, x: Value) -> Value:
    """A value as f32."""
    return x if x.dtype == "f32" else b.shaped(b.emit("cast", [x], dtype="f32"), x.shape)


def _plain(fn: str) -> Any:
    return lambda b, args, kwargs: unary(b, b.value(args[0]), fn)


for _torch, _ours in PLAIN.items():
    handlers[f"aten.{_torch}.default"] = _plain(_ours)


@handles("aten.relu.default")
def _relu(b: Builder, args: Any, kwargs: Any) -> Value:
    return unary(b, b.value(args[0]), "clip", 0.0, np.inf)


@handles("aten.relu6.default")
def _relu6(b: Builder, args: Any, kwargs: Any) -> Value:
    return unary(b, b.value(args[0]), "clip", 0.0, 6.0)


@handles("aten.hardtanh.default")
def _hardtanh(b: Builder, args: Any, kwargs: Any) -> Value:
    lo, hi = argument(args, kwargs, 1, "min_val", -1.0), argument(args, kwargs, 2, "max_val", 1.0)
    return unary(b, b.value(args[0]), "clip", lo, hi)


@handles("aten.clamp.default", "aten.clip.default", "aten.clamp_min.default", "aten.clamp_max.default")
def _clamp(b: Builder, args: Any, kwargs: Any) -> Value:
    name = str(kwargs.node.target)
    lo, hi = argument(args, kwargs, 1, "min"), argument(args, kwargs, 2, "max")
    if "clamp_max" in name:
        lo, hi = None, argument(args, kwargs, 1, "max")
    x = b.value(args[0])
    if x.dtype == "i64":
        for bound, fn in ((lo, "max"), (hi, "min")):
            x = x if bound is None else b.emit("binary", [x, b.value(int(bound))], fn=fn)
        return x
    return unary(b, x, "clip", -np.inf if lo is None else lo, np.inf if hi is None else hi)


@handles("aten.gelu.default")
def _gelu(b: Builder, args: Any, kwargs: Any) -> Value:
    tanh = argument(args, kwargs, 1, "approximate", "none") == "tanh"
    return unary(b, b.value(args[0]), "gelu_tanh" if tanh else "gelu")


@handles("aten.leaky_relu.default")
def _leaky(b: Builder, args: Any, kwargs: Any) -> Value:
    return unary(b, b.value(args[0]), "leaky_relu", argument(args, kwargs, 1, "negative_slope", 0.01))


@handles("aten.elu.default", "aten.celu.default")
def _elu(b: Builder, args: Any, kwargs: Any) -> Value:
    alpha = argument(args, kwargs, 1, "alpha", 1.0)
    if ("celu" in str(kwargs.node.target) and alpha != 1.0) or argument(args, kwargs, 2, "scale", 1.0) != 1.0:
        raise LowerError("ELU with scales has no program form", site=b.site, hint=b.where)
    return unary(b, b.value(args[0]), "elu", alpha)


@handles("aten.reciprocal.default")
def _reciprocal(b: Builder, args: Any, kwargs: Any) -> Value:
    return unary(b, b.value(args[0]), "rdiv", 1.0)


@handles("aten.prelu.default")
def _prelu(b: Builder, args: Any, kwargs: Any) -> Value:
    weight = b.stored_tensor(args[1]).reshape(-1)
    x = b.value(args[0])
    if weight.numel() == 1:
        return unary(b, x, "leaky_relu", float(weight))
    positive = unary(b, x, "clip", 0.0, np.inf)
    negative = unary(b, x, "clip", -np.inf, 0.0)
    slope = b.constant(weight.reshape(1, -1, *[1] * (x.rank - 2)), f"{b.site}.slope")
    return b.emit("binary", [positive, b.emit("binary", [negative, slope], fn="mul")], fn="add")


def _is_number(x: Any) -> bool:
    return isinstance(x, bool | int | float)


def _scalar(b: Builder, x: Value, fn: str, p: float, reflected: bool) -> Value | None:
    """A float operation with one number, as a unary op."""
    if fn in ("add", "mul"):
        return unary(b, x, fn, p)
    if fn == "sub":
        return unary(b, x, "rsub", p) if reflected else unary(b, x, "add", -p)
    if fn == "div":
        return unary(b, x, "rdiv" if reflected else "div", p)
    if fn == "pow" and not reflected:
        if p in (2.0, 0.5, -0.5):
            return unary(b, x, {2.0: "square", 0.5: "sqrt", -0.5: "rsqrt"}[p])
        return unary(b, x, "pow", p)
    if fn in ("min", "max"):
        return unary(b, x, "clip", p if fn == "max" else -np.inf, np.inf if fn == "max" else p)
    return None


def binary(b: Builder, fn: str, x: Any, y: Any) -> Value:
    """A binary op of values, stored tensors or numbers, promoted as torch would."""
    for number, other, reflected in ((y, x, False), (x, y, True)):
        if _is_number(number):
            value = b.value(other)
            if value.dtype == "f32":
                folded = _scalar(b, value, fn, float(number), reflected)
                if folded is not None:
                    return folded
    left, right = b.value(x), b.value(y)
    if left.dtype != right.dtype or fn == "div":
        if "f32" in (left.dtype, right.dtype) or fn == "div":
            left, right = as_float(b, left), as_float(b, right)
        else:
            left, right = as_integer(b, left), as_integer(b, right)
    return b.emit("binary", [left, right], fn=fn)


def as_integer(b: Builder, x: Value) -> Value:
    """A value as i64."""
    return x if x.dtype == "i64" else b.shaped(b.emit("cast", [x], dtype="i64"), x.shape)


def _binary(fn: str) -> Any:
    def handler(b: Builder, args: Any, kwargs: Any) -> Value:
        x, y = args[0], args[1]
        alpha = kwargs.get("alpha", args[2] if len(args) > 2 and fn in ("add", "sub") else 1)
        mode = kwargs.get("rounding_mode")
        if alpha != 1:
            y = binary(b, "mul", y, float(alpha))
        result = binary(b, "floordiv" if mode == "floor" else fn, x, y)
        if mode == "trunc":
            raise LowerError("division that truncates has no program form", site=b.site, hint=b.where)
        return result

    return handler


for _torch, _ours in BINARY.items():
    for _overload in (
        "Tensor",
        "Scalar",
        "default",
        "Tensor_Scalar",
        "Tensor_Tensor",
        "Tensor_mode",
        "Scalar_mode",
    ):
        handlers.setdefault(f"aten.{_torch}.{_overload}", _binary(_ours))


@handles("aten.rsub.Scalar", "aten.rsub.Tensor")
def _rsub(b: Builder, args: Any, kwargs: Any) -> Value:
    return binary(b, "sub", args[1], args[0])


@handles("aten.logical_not.default", "aten.bitwise_not.default")
def _not(b: Builder, args: Any, kwargs: Any) -> Value:
    return b.emit("binary", [b.value(args[0]), b.value(False)], fn="eq")


@handles("aten.where.self", "aten.where.ScalarOther", "aten.where.ScalarSelf")
def _where(b: Builder, args: Any, kwargs: Any) -> Value:
    c, x, y = args
    x, y = _branches(b, x, y)
    return b.emit("where", [b.value(c), x, y])


def _branches(b: Builder, x: Any, y: Any) -> tuple[Value, Value]:
    if _is_number(x) and not _is_number(y):
        y = b.value(y)
        x = b.value(float(x) if y.dtype == "f32" else int(x))
    elif _is_number(y):
        x = b.value(x)
        y = b.value(float(y) if x.dtype == "f32" else int(y))
    x, y = b.value(x), b.value(y)
    if x.dtype != y.dtype:
        x, y = as_float(b, x), as_float(b, y)
    return x, y


@handles("aten.masked_fill.Scalar", "aten.masked_fill.Tensor")
def _masked_fill(b: Builder, args: Any, kwargs: Any) -> Value:
    x, mask, value = args
    x = b.value(x)
    if _is_number(value):
        value = b.value(float(value) if x.dtype == "f32" else int(value))
    return b.emit("where", [b.value(mask), b.value(value), x])


@handles(
    "aten.to.dtype", "aten._to_copy.default", "aten.to.dtype_layout", "aten.to.device", "aten.type_as.default",
    "aten.to.other", "aten.float.default",
)  # fmt: skip
def _to(b: Builder, args: Any, kwargs: Any) -> Any:
    dtype = kwargs.node.meta["val"].dtype
    target = _DTYPES.get(dtype)
    x = args[0]
    if target == "f32" and not isinstance(x, Value) and x.tensor.dtype in (torch.float16, torch.bfloat16):
        return x  # a stored half-precision weight: float products read it as it is
    x = b.value(x)
    if target == x.dtype:
        return x
    if target == "bf16" and x.dtype == "f32":
        return b.shaped(b.emit("cast", [x], dtype="bf16"), x.shape)
    if target not in ("f32", "i64", "bool"):
        raise LowerError(f"a conversion to {dtype} has no program form", site=b.site, hint=b.where)
    return b.shaped(b.emit("cast", [x], dtype=target), x.shape)


@handles(
    "aten.dropout.default", "aten.feature_dropout.default", "aten.contiguous.default", "aten.clone.default",
    "aten.detach.default", "aten.alias.default", "aten.lift_fresh_copy.default", "aten.detach_.default",
    "aten.alpha_dropout.default", "aten._assert_tensor_metadata.default",
)  # fmt: skip
def _same(b: Builder, args: Any, kwargs: Any) -> Any:
    return args[0]

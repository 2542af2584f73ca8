"""Lowering of torch ops that make tensors or pick entries."""

from __future__ import annotations

from typing import Any

from pennyweight.errors import LowerError
from pennyweight.program.lower.activations import as_integer
from pennyweight.program.lower.builder import _DTYPES, Builder, Value, argument, handles


def _dtype(kwargs: Any) -> str:
    return _DTYPES[kwargs.node.meta["val"].dtype]


@handles("aten.arange.default", "aten.arange.start", "aten.arange.start_step")
def _arange(b: Builder, args: Any, kwargs: Any) -> Value:
    start, stop, step = (
        (0, args[0], 1) if len(args) == 1 else (args[0], args[1], args[2] if len(args) > 2 else 1)
    )
    size = b.dims(kwargs.node.meta["val"].shape)[0]
    if not all(isinstance(v, int) for v in (start, step)):
        raise LowerError(
            "arange with a start or step that is no integer", site=b.site, hint=f"{b.where} stop={stop}"
        )
    y = b.emit("iota", [], size=size, step=step, start=start)
    return y if _dtype(kwargs) == "i64" else b.emit("cast", [y], dtype="f32")


@handles(
    *(f"aten.{kind}{like}.default" for kind in ("zeros", "ones", "full") for like in ("", "_like")),
    "aten.new_zeros.default", "aten.new_ones.default", "aten.new_full.default", "aten.scalar_tensor.default",
)  # fmt: skip
def _full(b: Builder, args: Any, kwargs: Any) -> Value:
    name = str(kwargs.node.target).split(".")[1]
    value = 0.0 if "zeros" in name else 1.0
    if "full" in name:
        value = args[2] if name == "new_full" else args[1]
    elif name == "scalar_tensor":
        value = args[0]
    dtype = _dtype(kwargs)
    value = {"f32": float, "i64": int, "bool": bool}[dtype](value)
    return b.emit("full", [], shape=b.dims(kwargs.node.meta["val"].shape), value=value, dtype=dtype)


@handles("aten.index.Tensor")
def _index(b: Builder, args: Any, kwargs: Any) -> Value:
    x, indices = b.value(args[0]), list(args[1])
    used = [i for i, v in enumerate(indices) if v is not None]
    values = [b.value(indices[i]) for i in used]
    if any(v.dtype == "bool" for v in values):
        raise LowerError("selection by a mask makes sizes that depend on data", site=b.site, hint=b.where)
    if len(used) == 1:
        return b.emit("gather", [x, as_integer(b, values[0])], axis=used[0])
    if used != list(range(len(used))):
        raise LowerError("indexing of axes that do not lead has no program form", site=b.site, hint=b.where)
    return b.emit("gather_nd", [x, *(as_integer(b, v) for v in values)])


@handles("aten.gather.default")
def _gather(b: Builder, args: Any, kwargs: Any) -> Value:
    """`y[i, j, ...] = x[i, index[i, j, ...], ...]`: every other axis is indexed by its own places."""
    x, index = b.value(args[0]), as_integer(b, b.value(args[2]))
    axis = args[1] % x.rank
    places = []
    for i in range(x.rank):
        if i == axis:
            places.append(index)
            continue
        line = b.emit("iota", [], size=index.shape[i], step=1, start=0)
        places.append(
            b.emit("reshape", [line], shape=[index.shape[i] if k == i else 1 for k in range(x.rank)])
        )
    return b.emit("gather_nd", [x, *places])


@handles("aten.index_select.default")
def _index_select(b: Builder, args: Any, kwargs: Any) -> Value:
    x = b.value(args[0])
    return b.emit("gather", [x, b.value(args[2])], axis=args[1] % x.rank)


@handles("aten.tril.default", "aten.triu.default")
def _triangle(b: Builder, args: Any, kwargs: Any) -> Value:
    x, diagonal = b.value(args[0]), argument(args, kwargs, 1, "diagonal", 0)
    rows = b.emit("iota", [], size=x.shape[-2], step=1, start=diagonal)
    rows = b.emit("reshape", [rows], shape=[x.shape[-2], 1])
    columns = b.emit("iota", [], size=x.shape[-1], step=1, start=0)
    keep = b.emit("binary", [columns, rows], fn="le" if "tril" in str(kwargs.node.target) else "ge")
    zero = b.value({"f32": 0.0, "i64": 0, "bool": False}[x.dtype])
    return b.emit("where", [keep, x, zero])


@handles("aten._assert_scalar.default", "aten.sym_constrain_range_for_size.default", "aten._assert_async.msg")
def _assert(b: Builder, args: Any, kwargs: Any) -> None:
    return None

"""Which module does what a node of a graph of functions does, with the node's own tensors and hyper-parameters."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

_CONVS: dict[str, type[nn.Module]] = {"conv1d": nn.Conv1d, "conv2d": nn.Conv2d, "conv3d": nn.Conv3d}
_TRANSPOSED: dict[str, type[nn.Module]] = {
    "conv_transpose1d": nn.ConvTranspose1d,
    "conv_transpose2d": nn.ConvTranspose2d,
    "conv_transpose3d": nn.ConvTranspose3d,
}
_NORMS: dict[int, type[nn.Module]] = {
    2: nn.BatchNorm1d,
    3: nn.BatchNorm1d,
    4: nn.BatchNorm2d,
    5: nn.BatchNorm3d,
}
_FEATURE_DROPOUTS: dict[int, type[nn.Module]] = {3: nn.Dropout1d, 4: nn.Dropout2d, 5: nn.Dropout3d}
_DROPOUTS: dict[str, type[nn.Module]] = {
    "dropout": nn.Dropout,
    "dropout1d": nn.Dropout1d,
    "dropout2d": nn.Dropout2d,
    "dropout3d": nn.Dropout3d,
    "alpha_dropout": nn.AlphaDropout,
    "feature_alpha_dropout": nn.FeatureAlphaDropout,
}
_SIGNATURES: dict[str, tuple[tuple[str, Any], ...]] = {
    "linear": (),
    "conv": (("stride", 1), ("padding", 0), ("dilation", 1), ("groups", 1)),
    "transposed": (("stride", 1), ("padding", 0), ("output_padding", 0), ("groups", 1), ("dilation", 1)),
    "norm": (
        ("running_mean", None), ("running_var", None), ("training", False), ("momentum", 0.1), ("eps", 1e-5),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Found:
    """A module that does what a node does.

    Attributes:
        module: it, in the mode that the node is in.
        path: where to put it.
        key: what tells it from others; equal keys are one module.
        args: operands of its call; kwargs likewise.
        inner: the recorder's name of the operation inside of a module that is no layer itself.
        nested: whether results behind the first come as one tuple, where the node has them side by side.
    """

    module: nn.Module
    path: str
    key: tuple[Any, ...]
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    inner: str = ""
    nested: bool = False

    @property
    def stem(self) -> str:
        """A name for it beside other layers in one place: "in_proj" for what was `in_proj_weight`."""
        last = str(self.key[1]).rpartition(".")[2]
        return last.removesuffix("weight").removesuffix("running_mean").strip("_") or "layer"


class Attention(nn.Module):
    """`scaled_dot_product_attention` whose dropout is off in eval mode; all else as the call says."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """query [..., t, d], key [..., s, d], value [..., s, e] -> [..., t, e]."""
        kwargs["dropout_p"] = self.p if self.training else 0.0
        return F.scaled_dot_product_attention(*args, **kwargs)

    def extra_repr(self) -> str:
        """Probability, for printing."""
        return f"p={self.p}"


def layer_of(owner: fx.GraphModule, node: fx.Node) -> Found | None:
    """The module that does what a node does; None for a node that stays a function."""
    name = function_name(node.target)
    if name == "batch_norm":
        return _norm(owner, node)
    if name == "embedding":
        return _embedding(owner, node)
    if name == "scaled_dot_product_attention":
        return _attention(node)
    if name in ("lstm", "gru"):
        return _recurrent(owner, node, name)
    if name.startswith("rrelu") or "dropout" in name:
        return _random(node, name)
    return _product(owner, node, name)


def function_name(target: Any) -> str:
    """`torch.ops.aten.conv2d.default` and `F.conv2d` are both "conv2d"."""
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.rpartition("::")[2]
    name = str(getattr(target, "__name__", ""))
    if target in (F.linear, F.batch_norm) or getattr(target, "__module__", "") in ("torch._C._nn", "torch"):
        return name
    return name if getattr(F, name or "?", None) is target else ""


def _product(owner: fx.GraphModule, node: fx.Node, name: str) -> Found | None:
    family = "linear" if name == "linear" else ""
    family = "conv" if name in _CONVS else "transposed" if name in _TRANSPOSED else family
    if not family:
        return None
    names = ("weight", "bias", *(n for n, _ in _SIGNATURES[family]))
    given = _bound(node, names, dict(_SIGNATURES[family]))
    weight, bias = stored(owner, given["weight"]), stored(owner, given["bias"])
    if weight is None or (bias is None and given["bias"] is not None):
        return None
    options = {n: _plain(given[n]) for n, _ in _SIGNATURES[family]}
    if any(isinstance(v, fx.Node) for v in options.values()):
        return None
    shape = weight.shape
    if family == "linear":
        module: nn.Module = nn.Linear(shape[1], shape[0], bias is not None, device="meta")
    else:
        groups, kernel = options["groups"], tuple(shape[2:])
        channels = (shape[1] * groups, shape[0]) if family == "conv" else (shape[0], shape[1] * groups)
        kind = (_CONVS if family == "conv" else _TRANSPOSED)[name]
        module = kind(*channels, kernel, bias=bias is not None, device="meta", **options)
    module.weight = _parameter(weight)
    if bias is not None:
        module.bias = _parameter(bias)
    target = str(given["weight"].target)
    return Found(module.train(owner.training), _home(target), (name, target, str(options)), (node.args[0],))


def _norm(owner: fx.GraphModule, node: fx.Node) -> Found | None:
    aten = isinstance(node.target, torch._ops.OpOverload)
    lead = ("weight", "bias", "running_mean", "running_var") if aten else (
        "running_mean", "running_var", "weight", "bias",
    )  # fmt: skip
    given = _bound(node, (*lead, "training", "momentum", "eps"), dict(_SIGNATURES["norm"]))
    tensors = {k: stored(owner, given[k]) for k in lead}
    value = node.args[0].meta.get("val") if isinstance(node.args[0], fx.Node) else None
    kind = _NORMS.get(value.ndim) if isinstance(value, Tensor) else nn.BatchNorm2d
    mean, var = tensors["running_mean"], tensors["running_var"]
    momentum, eps, training = given["momentum"], given["eps"], given["training"]
    if mean is None or var is None or kind is None or any(isinstance(v, fx.Node) for v in (momentum, eps)):
        return None
    if not training and momentum == 0:
        momentum = None  # a norm that averages over all batches is exported in eval mode with this
    affine = tensors["weight"] is not None
    module: Any = kind(mean.shape[0], eps=eps, momentum=momentum, affine=affine, device="meta")
    module.running_mean, module.running_var = mean, var
    target = str(given["running_mean"].target)
    path = _home(target)
    count = attribute(owner, f"{path}.num_batches_tracked")
    module.num_batches_tracked = torch.zeros((), dtype=torch.int64) if count is None else count
    if affine:
        module.weight = _parameter(tensors["weight"])
        bias = tensors["bias"]
        module.bias = nn.Parameter(torch.zeros_like(mean)) if bias is None else _parameter(bias)
    return Found(module.train(bool(training)), path, ("batch_norm", target, eps), (node.args[0],))


def _embedding(owner: fx.GraphModule, node: fx.Node) -> Found | None:
    if isinstance(node.target, torch._ops.OpOverload):
        table, ids = node.args[:2]
        given = _bound(node, ("ids", "padding_idx"), {"padding_idx": -1})
    else:
        given = _bound(node, ("table", "padding_idx"), {})
        ids, table = node.args[0], given["table"] or node.kwargs.get("weight")
    weight, padding = stored(owner, table), given["padding_idx"]
    if weight is None or len(node.args) > 3 or set(node.kwargs) - {"weight", "padding_idx"}:
        return None
    rows, width = weight.shape
    padding = None if padding is None or padding < 0 else padding
    module = nn.Embedding(rows, width, padding, device="meta")
    module.weight = _parameter(weight)
    target = str(table.target)  # type: ignore[union-attr]
    return Found(module.train(owner.training), _home(target), ("embedding", target, padding), (ids,))


def _recurrent(owner: fx.GraphModule, node: fx.Node, name: str) -> Found | None:
    """A recurrent layer in all its directions and depths, without projections."""
    if len(node.args) != 9 or not isinstance(node.args[2], list | tuple):
        return None  # packed sequences
    x, state, weights, biases, depth, dropout, training, both, batch_first = node.args
    tensors = [stored(owner, w) for w in weights]  # type: ignore[union-attr]
    numbers = (biases, depth, dropout, training, both, batch_first)
    if any(t is None for t in tensors) or any(isinstance(n, fx.Node) for n in numbers):
        return None
    kind, gates = (nn.LSTM, 4) if name == "lstm" else (nn.GRU, 3)
    module: Any = kind(
        tensors[0].shape[1], tensors[0].shape[0] // gates, depth, bool(biases), bool(batch_first), dropout, bool(both),
        device="meta",
    )  # fmt: skip
    if [tuple(t.shape) for t in tensors] != [tuple(t.shape) for t in module._flat_weights]:
        return None
    for key, tensor in zip(module._flat_weights_names, tensors, strict=True):
        setattr(module, key, _parameter(tensor))
    target = str(weights[0].target)  # type: ignore[index,union-attr]
    states = tuple(state) if name == "lstm" else state  # type: ignore[arg-type]
    args = (x, states)
    return Found(module.train(bool(training)), _home(target), (name, target), args, nested=name == "lstm")


def _random(node: fx.Node, name: str) -> Found | None:
    """Dropout of every kind, and the leaky unit of random slope: modules that heed their mode."""
    inplace = name.endswith("_")
    name = name.rstrip("_")
    if name == "rrelu":
        given = _bound(
            node, ("lower", "upper", "training"), {"lower": 1 / 8, "upper": 1 / 3, "training": False}
        )
        module: nn.Module = nn.RReLU(given["lower"], given["upper"], inplace)
    else:
        value = node.args[0].meta.get("val") if isinstance(node.args[0], fx.Node) else None
        rank = value.ndim if isinstance(value, Tensor) else -1
        kind = _FEATURE_DROPOUTS.get(rank) if name == "feature_dropout" else _DROPOUTS.get(name)
        given = _bound(node, ("p", "training"), {"p": 0.5, "training": node.kwargs.get("train", True)})
        if kind is None or any(isinstance(v, fx.Node) for v in given.values()):
            return None
        module = kind(given["p"], inplace or bool(node.kwargs.get("inplace", False)))
    path = _module_path(node, type(module).__name__)
    return Found(module.train(bool(given["training"])), path, (name, path, str(module)), (node.args[0],))


def _attention(node: fx.Node) -> Found | None:
    args, kwargs = list(node.args), dict(node.kwargs)
    p = args.pop(4) if len(args) > 4 else kwargs.pop("dropout_p", 0.0)
    if not isinstance(p, float) or not p:
        return None
    if len(args) > 4:
        kwargs["is_causal"] = args.pop(4)
    path = _module_path(node, "")
    key = ("attention", path, p, node.name)
    inner = ":scaled_dot_product_attention/0"
    return Found(Attention(p).train(), path, key, tuple(args), kwargs, inner)


def _bound(node: fx.Node, names: tuple[str, ...], defaults: dict[str, Any]) -> dict[str, Any]:
    """Operands behind the first one by name."""
    given = dict(zip(names, node.args[1:], strict=False))
    return {n: given.get(n, node.kwargs.get(n, defaults.get(n))) for n in names}


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list | tuple) else value


def _parameter(x: Tensor) -> nn.Parameter:
    """Itself, or for a buffer a parameter over the same memory that is not trained."""
    return x if isinstance(x, nn.Parameter) else nn.Parameter(x, requires_grad=False)


def attribute(owner: nn.Module, path: str) -> Any:
    """The parameter or buffer of a dotted name, or None."""
    value: Any = owner
    for part in path.split("."):
        value = getattr(value, part, None)
    return value if isinstance(value, Tensor) else None


def stored(owner: nn.Module, node: Any) -> Any:
    """The parameter or buffer that a node fetches, or None for what no node fetches."""
    return attribute(owner, str(node.target)) if isinstance(node, fx.Node) and node.op == "get_attr" else None


def _home(target: str) -> str:
    """The path of the module that held a tensor; one of its own for a tensor of the root."""
    return target.rpartition(".")[0] or target.replace(".", "_") + "_layer"


def _module_path(node: fx.Node, kind: str) -> str:
    """Where the module that made a node stood; under it, by the node's name, if it was of another class."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path, made_by = (str(stack[-1][0]), str(stack[-1][1])) if stack else ("", "")
    if not re.fullmatch(r"\w+(\.\w+)*", path):
        path = ""
    if path and kind and made_by.rpartition(".")[2].removesuffix("'>") == kind:
        return path
    return f"{path}.{node.name.rstrip('_')}".lstrip(".")

"""`nn.MultiheadAttention`: projections as integer linears, and with calibrated activations the attention on codes.

Sites of a layer `attn`: the operands `attn:input`, `attn:input1`, `attn:input2` (tied where they are one tensor), the
weights `attn:in_proj_weight` (or `q_proj_weight`, ...) and `attn:out_proj.weight`, and inside of it `attn:query`,
`attn:key`, `attn:value` after their projections and `attn:context` before the last one.
"""

from __future__ import annotations

import dataclasses
import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pennyweight.errors import InputError, UnrealisableSite
from pennyweight.nn import twins
from pennyweight.nn.fake import ActivationQuantizer
from pennyweight.nn.integer import greatest_code, unsigned_params
from pennyweight.nn.linear import IntegerLinear, activation_quantizer
from pennyweight.nn.rounding import rounded
from pennyweight.plan import ATTENTION_INNER, LayerPlan
from pennyweight.qtensor import QTensor

ROLES = ("query", "key", "value")


class Attention(nn.Module):
    """The computation that twin and integer module share.

        context = attention(q, k, v),   q, k, v = the projected operands, split into heads
        result = context W_out^T + b_out

    Subclasses say how to project, attend and combine.
    """

    embed_dim: int
    num_heads: int
    batch_first: bool
    layer: LayerPlan

    def project(self, role: str, x: Tensor) -> Tensor:
        """[..., width] -> [..., E] of query, key or value."""
        raise NotImplementedError

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        """Queries [N, H, L, D], keys and values [N, H, S, D], additive mask -> [N, H, L, D]."""
        raise NotImplementedError

    def combine(self, context: Tensor) -> Tensor:
        """[..., E] -> [..., E], the last projection."""
        raise NotImplementedError

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None,
        need_weights: bool = True, attn_mask: Tensor | None = None, average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """As `nn.MultiheadAttention`.

        The weights that `need_weights` asks for are computed in float from the projected operands; the result does
        not read them, and a program whose caller drops them does not hold them.

        Raises:
            InputError: if `is_causal` comes without a mask, as in torch.
        """
        if is_causal and attn_mask is None:
            raise InputError("is_causal is a hint about attn_mask, and there is none", site=self.layer.name)
        batched = query.dim() == 3
        if not batched:
            axis = 0 if self.batch_first else 1
            query, key, value = (x.unsqueeze(axis) for x in (query, key, value))
        q, k, v = (self._split(self.project(r, x)) for r, x in zip(ROLES, (query, key, value), strict=True))
        causal = is_causal and key_padding_mask is None and not need_weights
        mask = self._mask(None if causal else attn_mask, key_padding_mask, q)
        out = self.combine(self._join(self.attend(q, k, v, mask, causal)))
        weights = self._weights(q, k, mask, average_attn_weights) if need_weights else None
        if not batched:
            out = out.squeeze(0 if self.batch_first else 1)
            weights = None if weights is None else weights.squeeze(0)
        return out, weights

    def _split(self, x: Tensor) -> Tensor:
        """[N, L, E] (or [L, N, E]) -> [N, H, L, D]."""
        heads: Tensor = x.unflatten(-1, (self.num_heads, self.embed_dim // self.num_heads))
        return heads.permute(0, 2, 1, 3) if self.batch_first else heads.permute(1, 2, 0, 3)

    def _join(self, x: Tensor) -> Tensor:
        """[N, H, L, D] -> [N, L, E] (or [L, N, E])."""
        moved = x.permute(0, 2, 1, 3) if self.batch_first else x.permute(2, 0, 1, 3)
        return moved.flatten(2)

    def _mask(self, attn_mask: Tensor | None, padding: Tensor | None, q: Tensor) -> Tensor | None:
        """Both masks as one additive mask that broadcasts to [N, H, L, S]."""
        found: list[Tensor] = []
        if attn_mask is not None:
            shaped = attn_mask if attn_mask.dim() == 2 else attn_mask.unflatten(0, (-1, self.num_heads))
            found.append(additive(shaped, q))  # [L, S] or [N, H, L, S]
        if padding is not None:
            padding = padding if padding.dim() == 2 else padding.unsqueeze(0)
            found.append(additive(padding, q)[:, None, None, :])  # [N, 1, 1, S]
        return None if not found else found[0] if len(found) == 1 else found[0] + found[1]

    def _weights(self, q: Tensor, k: Tensor, mask: Tensor | None, average: bool) -> Tensor:
        """[N, L, S] averaged over the heads, or [N, H, L, S]."""
        scores = (q * (1.0 / math.sqrt(q.shape[-1]))) @ k.transpose(-1, -2)
        weights = torch.softmax(scores if mask is None else scores + mask, -1)
        return weights.mean(1) if average else weights


def additive(mask: Tensor, like: Tensor) -> Tensor:
    """A mask whose True means "not this one" as -inf and 0; a float mask as it is."""
    if mask.dtype != torch.bool:
        return mask.to(like.dtype)
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, float("-inf"))


class MultiheadAttentionTwin(Attention, nn.MultiheadAttention):
    """Attention with the float module's own parameters, every operand through its quantizer."""

    def __init__(self, module: nn.MultiheadAttention, layer: LayerPlan) -> None:
        nn.Module.__init__(self)
        for name, value in vars(module).items():
            if not name.startswith("_") or name == "_qkv_same_embed_dim":
                setattr(self, name, value)
        for name, parameter in module._parameters.items():
            self.register_parameter(name, parameter)
        self.out_proj = module.out_proj
        self.layer = layer
        self.input, self.input1, self.input2 = (activation_quantizer(layer, p) for p in range(3))
        self.inner = nn.ModuleDict(
            {name: ActivationQuantizer(spec, f"{layer.name}:{name}") for name, spec in layer.inner.items()}
        )
        self.solved: dict[str, QTensor] = {}

    def weight_rows(self, role: str) -> tuple[str, slice]:
        """Which weight, and which of its rows, project an operand."""
        if not self._qkv_same_embed_dim:
            return f"{role[0]}_proj_weight", slice(None)
        first = ROLES.index(role) * self.embed_dim
        return "in_proj_weight", slice(first, first + self.embed_dim)

    def bias_rows(self, role: str) -> Tensor | None:
        """The bias of an operand's projection, [E]."""
        first = ROLES.index(role) * self.embed_dim
        return None if self.in_proj_bias is None else self.in_proj_bias[first : first + self.embed_dim]

    def quantizer(self, role: str) -> ActivationQuantizer | None:
        """The quantizer of an operand."""
        return (self.input, self.input1, self.input2)[ROLES.index(role)]

    def _inner(self, name: str, x: Tensor) -> Tensor:
        return cast("Tensor", self.inner[name](x)) if name in self.inner else x

    def project(self, role: str, x: Tensor) -> Tensor:
        """See `Attention`."""
        quantizer, (name, rows) = self.quantizer(role), self.weight_rows(role)
        weight = rounded(self, name, getattr(self, name))
        x = x if quantizer is None else quantizer(x)
        return self._inner(role, F.linear(x, weight[rows], self.bias_rows(role)))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        """See `Attention`."""
        dropout = self.dropout if self.training else 0.0
        return F.scaled_dot_product_attention(q, k, v, mask, dropout, causal)

    def combine(self, context: Tensor) -> Tensor:
        """See `Attention`."""
        weight = rounded(self, "out_proj.weight", self.out_proj.weight)
        return F.linear(self._inner("context", context), weight, self.out_proj.bias)


class IntegerMultiheadAttention(Attention):
    """Converted: four integer linears, and attention on codes where activations are calibrated, in float otherwise.

    scale_<name>, zero_<name>: 0-d float32 buffers for query, key and value.
    """

    in_proj_bias = None  # torch's layers ask, and take their plain path when there is none
    _qkv_same_embed_dim = False

    def __init__(self, twin: MultiheadAttentionTwin) -> None:
        super().__init__()
        self.layer, self.embed_dim, self.num_heads = twin.layer, twin.embed_dim, twin.num_heads
        self.batch_first, self.kdim, self.vdim = twin.batch_first, twin.kdim, twin.vdim
        self.on_codes = bool(twin.inner)
        for role in ROLES:
            name, rows = twin.weight_rows(role)
            q = matrix_rows(twin.solved[name], rows)
            linear = self._linear(f"{role[0]}_proj", q, twin.bias_rows(role), twin.quantizer(role))
            self.add_module(f"{role[0]}_proj", linear)
            if self.on_codes:
                scale, zero = unsigned_params(cast("ActivationQuantizer", twin.inner[role]))
                self.register_buffer(f"scale_{role}", scale)
                self.register_buffer(f"zero_{role}", zero)
                if greatest_code(twin.inner[role].spec) != 255:  # type: ignore[arg-type]
                    raise UnrealisableSite(
                        "attention inside of a module takes operands of 8 bits",
                        site=f"{self.layer.name}:{role}",
                        spec=str(twin.inner[role].spec),
                    )
        context = cast("ActivationQuantizer", twin.inner["context"]) if self.on_codes else None
        self.out_proj = self._linear("out_proj", twin.solved["out_proj.weight"], twin.out_proj.bias, context)

    def _linear(
        self, name: str, q: QTensor, bias: Tensor | None, quantizer: ActivationQuantizer | None
    ) -> IntegerLinear:
        inputs = {0: self.layer.inputs[0]} if self.layer.inputs else {}
        plan = LayerPlan(f"{self.layer.name}.{name}", "Linear", self.layer.weight, inputs, self.layer.dynamic)
        out = IntegerLinear(plan, q, tuple(q.codes.shape))
        bias = None if bias is None else bias.detach().float().clone()
        if quantizer is not None:
            out.calibrated(quantizer)
            bias = out.integer_bias(bias)
        out.register_buffer("bias", bias)
        return out

    def project(self, role: str, x: Tensor) -> Tensor:
        """See `Attention`."""
        return cast("Tensor", getattr(self, f"{role[0]}_proj")(x))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        """See `Attention`."""
        if not self.on_codes:
            return F.scaled_dot_product_attention(q, k, v, mask, 0.0, causal)
        params = [getattr(self, f"{kind}_{role}") for role in ROLES for kind in ("scale", "zero")]
        out: Tensor = torch.ops.pennyweight.attention(
            q, k, v, mask, causal, 1.0 / math.sqrt(q.shape[-1]), *params
        )
        return out

    def combine(self, context: Tensor) -> Tensor:
        """See `Attention`."""
        return self.out_proj(context)  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        """Scheme, for printing."""
        kind = "on codes" if self.on_codes else "in float"
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, attention {kind}"


def matrix_rows(q: QTensor, rows: slice) -> QTensor:
    """Some rows of a quantized matrix, scales and zero points with them."""

    def cut(x: Tensor | None) -> Tensor | None:
        return x if x is None or x.shape[0] == 1 else x[rows].contiguous()

    spec = dataclasses.replace(q.spec, scale="fp32")
    return QTensor(q.codes[rows].contiguous(), cast("Tensor", cut(q.scales())), cut(q.zero), spec)


class MultiheadAttentionFamily:
    """See `nn.Family`."""

    def prepare(self, module: nn.Module, layer: LayerPlan) -> nn.Module:
        """A `MultiheadAttentionTwin`.

        Raises:
            UnrealisableSite: if the module adds keys and values of its own, or rows of weights share a scale.
        """
        attention = cast("nn.MultiheadAttention", module)
        if attention.bias_k is not None or attention.add_zero_attn:
            raise UnrealisableSite(
                "attention with add_bias_kv or add_zero_attn has no integer form",
                site=layer.name,
                hint=f"Keep it in float: recipe.keep({layer.name!r}).",
            )
        block = () if layer.weight is None else layer.weight.block
        if len(block) > 1 and block[-2] != 1:
            raise UnrealisableSite(
                "the rows of an attention's weights belong to several products and cannot share a scale",
                site=layer.name,
                spec=str(layer.weight),
                hint="Use [1,*], groups along a row, or [*].",
            )
        return MultiheadAttentionTwin(attention, layer)

    def shapes(self, module: nn.Module) -> dict[str, tuple[int, int]]:
        """The projections."""
        return {n: (w.shape[0], w.shape[1]) for n, w in self.matrices(module).items()}

    def matrices(self, twin: nn.Module) -> dict[str, Tensor]:
        """Weights of the projections, [E or 3E, width]."""
        attention = cast("nn.MultiheadAttention", twin)
        weights = {n: p for n, p in attention._parameters.items() if n.endswith("proj_weight")}
        found = {n: p.detach() for n, p in weights.items() if p is not None}
        return found | {"out_proj.weight": attention.out_proj.weight.detach()}

    def convert(self, twin: nn.Module) -> nn.Module:
        """An `IntegerMultiheadAttention`."""
        return IntegerMultiheadAttention(cast("MultiheadAttentionTwin", twin))


assert set(ROLES) < set(ATTENTION_INNER)
twins.add("MultiheadAttention", MultiheadAttentionFamily())

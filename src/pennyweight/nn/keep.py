"""Layers kept in half precision: weights in 16 bits, sums in float32, operands rounded to bf16 where asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from pennyweight.errors import UnrealisableSite
from pennyweight.graph import ops
from pennyweight.nn import twins
from pennyweight.plan import LayerPlan

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


class HalfWeight(nn.Module):
    """A float layer whose parameters are stored in fp16 or bf16 and widened for the product.

    weight: stored dtype, the layer's own shape. bias: float32.
    """

    def __init__(self, module: nn.Module, layer: LayerPlan) -> None:
        super().__init__()
        self.layer, self.dtype = layer, _DTYPES[layer.keep]
        inner: Any = nn.Module.__new__(type(module))
        inner.__dict__.update(module.__dict__)
        inner._parameters = dict(module._parameters)
        weight = inner._parameters.pop("weight")
        self.register_buffer("weight", weight.detach().to(self.dtype))
        object.__setattr__(self, "inner", inner)
        bias = inner._parameters.pop("bias", None)
        self.register_buffer("bias", None if bias is None else bias.detach().float())

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the float layer."""
        if self.layer.narrow:
            args = narrowed(args, 1)
        inner: Any = self.__dict__["inner"]
        inner.__dict__["weight"] = cast("Tensor", self.weight).float()
        inner.__dict__["bias"] = (
            self.bias
        )  # every time: the last call may have been traced with other tensors
        return inner.forward(*args, **kwargs)


def narrowed(values: Sequence[Any], count: int) -> tuple[Any, ...]:
    """The first values, where they are float32 tensors, rounded to bf16 and back."""
    rounds = [i < count and isinstance(v, Tensor) and v.dtype == torch.float32 for i, v in enumerate(values)]
    return tuple(v.bfloat16().float() if r else v for v, r in zip(values, rounds, strict=True))


class NarrowCall(nn.Module):
    """A product of function operands, each rounded to bf16 first: `a @ b`, attention, `F.linear` and the like."""

    def __init__(self, layer: LayerPlan) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call `func` on rounded operands."""
        flat, tree = tree_flatten((args, kwargs))
        args, kwargs = tree_unflatten(narrowed(flat, 3 if self.layer.kind in ops.ATTENTION else 2), tree)
        return func(*args, **kwargs)


class KeepFamily:
    """See `nn.Family`; registered as "keep" for every layer that a rule keeps in 16 bits."""

    def prepare(self, module: nn.Module, layer: LayerPlan) -> nn.Module:
        """The module with its weight rounded to 16 bits.

        Raises:
            UnrealisableSite: if the module has no weight of its own.
        """
        if not isinstance(getattr(module, "weight", None), Tensor):
            raise UnrealisableSite(
                f"a {type(module).__name__} cannot be kept in {layer.keep}: it has no single weight",
                site=layer.name,
                hint="Keep it in float32.",
            )
        return HalfWeight(module, layer)

    def shapes(self, module: nn.Module) -> dict[str, tuple[int, int]]:
        """Nothing to check."""
        return {}

    def matrices(self, twin: nn.Module) -> dict[str, Tensor]:
        """Nothing to solve."""
        return {}

    def convert(self, twin: nn.Module) -> nn.Module:
        """Itself."""
        return twin


twins.add("keep", KeepFamily())

"""What an optimizer and a checkpoint should know of quantizers."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from pennyweight.nn.fake import Quantizer
from pennyweight.nn.rounding import ROUNDING


def parameter_groups(
    model: nn.Module, lr: float, weight_decay: float = 0.0, *, quantizer_lr: float | None = None,
    quantizer_decay: float = 0.0,
) -> list[dict[str, Any]]:  # fmt: skip
    """Groups for an optimizer: weights; vectors (biases, norms) without decay; scales and other learned numbers.

    Args:
        model: from `prepare`.
        lr: learning rate of the weights.
        weight_decay: of the weights.
        quantizer_lr: of what quantizers learn; `lr` by default.
        quantizer_decay: likewise; PACT wants one.
    """
    own = {id(p) for m in model.modules() if isinstance(m, Quantizer) for p in m.parameters()}
    free = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {
            "params": [p for p in free if id(p) not in own and p.ndim > 1],
            "lr": lr,
            "weight_decay": weight_decay,
        },
        {"params": [p for p in free if id(p) not in own and p.ndim <= 1], "lr": lr, "weight_decay": 0.0},
        {
            "params": [p for p in free if id(p) in own],
            "lr": lr if quantizer_lr is None else quantizer_lr,
            "weight_decay": quantizer_decay,
        },
    ]
    return [g for g in groups if g["params"]]


def float_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The entries that the float model has as well: without the quantizers'. Loads there with `strict=True`."""
    quantizers = tuple(
        f"{path}." for path, m in model.named_modules(remove_duplicate=False) if isinstance(m, Quantizer)
    )
    return {
        key: value
        for key, value in model.state_dict().items()
        if not key.startswith(quantizers) and f".{ROUNDING}." not in f".{key}"
    }

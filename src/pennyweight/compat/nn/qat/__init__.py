"""Layers of training by class have no counterpart: twins are found by type when a model is prepared."""

from __future__ import annotations

from typing import Any

from pennyweight.errors import PennyweightError


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    raise PennyweightError(
        f"torch.ao.nn.qat.{name} has no counterpart here",
        hint="Prepare the float model (prepare_qat, prepare_qat_fx, pw.training.prepare); its layers become trainable.",
    )

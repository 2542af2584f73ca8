"""Stubs: marks in a model where integers begin and end. Here they do nothing: the dataflow says it."""

from __future__ import annotations

from typing import Any

from torch import nn


class QuantStub(nn.Module):
    """Marks where a float tensor enters the quantized part. Identity."""

    def __init__(self, qconfig: Any = None) -> None:
        super().__init__()
        if qconfig:
            self.qconfig = qconfig

    def forward(self, x: Any) -> Any:
        """Returns `x`."""
        return x


class DeQuantStub(QuantStub):
    """Marks where a tensor leaves the quantized part. Identity."""


class QuantWrapper(nn.Module):
    """A module between two stubs."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        qconfig = getattr(module, "qconfig", None)
        self.quant, self.dequant = QuantStub(qconfig), DeQuantStub(qconfig)
        self.module = module
        self.train(module.training)

    def forward(self, x: Any) -> Any:
        """As the module."""
        return self.dequant(self.module(self.quant(x)))

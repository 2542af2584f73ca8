"""Twins: one module per module type, whatever the scheme. A twin shares the float parameters, then holds codes.

Each entry of `twins` is a `Family` under the class name of the float module it stands for.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

from pennyweight.plan import LayerPlan
from pennyweight.registry import Registry


class Family(Protocol):
    """How one module type is prepared and converted."""

    def prepare(self, module: nn.Module, layer: LayerPlan) -> nn.Module:
        """A twin that shares the parameters of `module`, to be calibrated."""
        ...

    def convert(self, twin: nn.Module) -> nn.Module:
        """The integer module of a calibrated and solved twin."""
        ...

    def shapes(self, module: nn.Module) -> dict[str, tuple[int, int]]:
        """Shapes of the weights' matrix views, [out, in], by the names `solved` uses."""
        ...

    def matrices(self, twin: nn.Module) -> dict[str, Tensor]:
        """The weights to be solved, as matrices [out, in], by the names `solved` uses."""
        ...


twins: Registry[Family] = Registry("module twins", "pennyweight.nn")

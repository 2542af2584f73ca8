"""Operations as modules, so that old prepared models could observe them. Here a plain `+` does as well."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FloatFunctional(nn.Module):
    """Sums, products and joins as methods."""

    def forward(self, x: Tensor) -> Tensor:
        """Raises RuntimeError: the methods are to be called."""
        raise RuntimeError("FloatFunctional is not called itself; use its methods, such as add(a, b)")

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """`x + y`."""
        return torch.add(x, y)

    def add_scalar(self, x: Tensor, y: float) -> Tensor:
        """`x + y`."""
        return torch.add(x, y)

    def mul(self, x: Tensor, y: Tensor) -> Tensor:
        """`x * y`."""
        return torch.mul(x, y)

    def mul_scalar(self, x: Tensor, y: float) -> Tensor:
        """`x * y`."""
        return torch.mul(x, y)

    def cat(self, x: list[Tensor], dim: int = 0) -> Tensor:
        """Join along an axis."""
        return torch.cat(x, dim=dim)

    def add_relu(self, x: Tensor, y: Tensor) -> Tensor:
        """`relu(x + y)`."""
        return F.relu(torch.add(x, y))

    def matmul(self, x: Tensor, y: Tensor) -> Tensor:
        """`x @ y`."""
        return torch.matmul(x, y)


class FXFloatFunctional(FloatFunctional):
    """The same, by the name that traced graphs knew."""


class QFunctional(FloatFunctional):
    """The same: a converted model keeps the operation and rounds its operands."""

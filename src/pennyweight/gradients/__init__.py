"""Estimators: how a rounding is trained through. One file per estimator.

An estimator says which numbers of a quantizer are learned, what they start from, how a tensor is rounded under them
and what gradient that has, and which scale and zero point they stand for at conversion. It is a frozen dataclass.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal, Protocol

from torch import Tensor

from pennyweight.qtensor import QParams
from pennyweight.registry import Registry
from pennyweight.spec import QuantSpec

Role = Literal["weight", "input"]


class Estimator(Protocol):
    """How one quantizer trains.

    Attributes:
        serves: what it can round: weights, inputs, or both.
        learns: names of the trained tensors; without any, the range follows what is seen.
    """

    serves: ClassVar[frozenset[Role]]
    learns: ClassVar[tuple[str, ...]]

    def start(self, params: QParams, spec: QuantSpec) -> dict[str, Tensor]:
        """The trained tensors by name, from a range; each at least 1-d, for sharded training.

        params: scale and zero of `spec.scale_shape(x.shape)`.
        """
        ...

    def first(self, x: Tensor, spec: QuantSpec) -> QParams:
        """A range to start from where none was calibrated, from the first values seen. x: matrix or batch."""
        ...

    def params(self, held: Mapping[str, Tensor], spec: QuantSpec) -> QParams:
        """Scale and zero point that the trained tensors stand for."""
        ...

    def round(self, x: Tensor, held: Mapping[str, Tensor], spec: QuantSpec, count: int) -> Tensor:
        """Values on the grid, differentiable in x and in what is learned.

        x: any shape that `spec` fits; held: the trained tensors, or "scale" and "zero"; count: elements that share a
        scale, of one sample.
        """
        ...

    def latent(self, x: Tensor) -> Tensor:
        """What is rounded at conversion, given a weight."""
        ...


estimators: Registry[Estimator] = Registry("gradient estimators", "pennyweight.gradients")

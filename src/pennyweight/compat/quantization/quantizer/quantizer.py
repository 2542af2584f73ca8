"""What a quantizer says of an exported graph: specs on the edges and results of its nodes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx import Node

EdgeOrNode = tuple[Node, Node] | Node  # a value as one consumer reads it, or as its producer gives it
ANNOTATION = "quantization_annotation"  # where a node's meta has it


class QuantizationSpecBase(ABC):  # noqa: B024 (a common name for the kinds below, as it always was)
    """Base of the kinds of specs."""


@dataclass(eq=True, frozen=True)
class QuantizationSpec(QuantizationSpecBase):
    """How one tensor is quantized.

    Args:
        dtype: of the codes.
        observer_or_fake_quant_ctr: constructor of an observer or fake-quantizer; only its kind is read, which names the
            range rule.
        quant_min: least code; the dtype's by default.
        quant_max: greatest code.
        qscheme: symmetric or affine, per tensor or per channel.
        ch_axis: axis of the channels.
        is_dynamic: ranged at run time.

    Raises:
        ValueError: if `quant_min` exceeds `quant_max`, or the axis is negative.
    """

    dtype: torch.dtype
    observer_or_fake_quant_ctr: Any = None
    quant_min: int | None = None
    quant_max: int | None = None
    qscheme: torch.qscheme | None = None
    ch_axis: int | None = None
    is_dynamic: bool = False

    def __post_init__(self) -> None:
        if self.quant_min is not None and self.quant_max is not None and self.quant_min > self.quant_max:
            raise ValueError(f"quant_min {self.quant_min} must be <= quant_max {self.quant_max}.")
        if self.ch_axis is not None and self.ch_axis < 0:
            raise ValueError("Ch_axis is < 0.")


@dataclass(eq=True, frozen=True)
class FixedQParamsQuantizationSpec(QuantizationSpecBase):
    """A tensor whose scale and zero point are known beforehand, such as the result of a sigmoid."""

    dtype: torch.dtype
    scale: float
    zero_point: int
    quant_min: int | None = None
    quant_max: int | None = None
    qscheme: torch.qscheme | None = None
    is_dynamic: bool = False


@dataclass(eq=True, frozen=True)
class SharedQuantizationSpec(QuantizationSpecBase):
    """The spec, and the scale, of another edge or node's result."""

    edge_or_node: EdgeOrNode


@dataclass(eq=True, frozen=True)
class DerivedQuantizationSpec(QuantizationSpecBase):
    """A scale computed from those of others; here for biases alone, whose scale is always input times weight."""

    derived_from: list[EdgeOrNode]
    derive_qparams_fn: Callable[[list[Any]], tuple[Tensor, Tensor]]
    dtype: torch.dtype
    quant_min: int | None = None
    quant_max: int | None = None
    qscheme: torch.qscheme | None = None
    ch_axis: int | None = None
    is_dynamic: bool = False


@dataclass
class QuantizationAnnotation:
    """What `node.meta["quantization_annotation"]` holds.

    Args:
        input_qspec_map: specs of the edges into the node, by producer.
        output_qspec: spec of its result, which whoever reads it without a spec of its own takes over.
        allow_implicit_sharing: read for the signature's sake: equal values always share one scale here.
        _annotated: a mark for annotators: this node is taken.
    """

    input_qspec_map: dict[Node, QuantizationSpecBase | None] = field(default_factory=dict)
    output_qspec: QuantizationSpecBase | None = None
    allow_implicit_sharing: bool = True
    _annotated: bool = False


class Quantizer(ABC):
    """Says what in an exported graph is quantized, and how. Derive from it and annotate nodes."""

    def transform_for_annotation(self, model: fx.GraphModule) -> fx.GraphModule:
        """Rewrite the graph before it is annotated; unchanged by default."""
        return model

    @abstractmethod
    def annotate(self, model: fx.GraphModule) -> fx.GraphModule:
        """Write `QuantizationAnnotation`s into the meta of the nodes."""

    @abstractmethod
    def validate(self, model: fx.GraphModule) -> None:
        """Raise if the annotated graph is not what the backend can run."""

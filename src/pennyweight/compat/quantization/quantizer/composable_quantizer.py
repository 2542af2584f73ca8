"""`ComposableQuantizer`: several quantizers in turn, none of which may overrule another."""

from __future__ import annotations

from typing import Any

from torch import fx

from pennyweight.compat.quantization.quantizer.quantizer import ANNOTATION, Quantizer
from pennyweight.errors import PlanError


class ComposableQuantizer(Quantizer):
    """Annotates with each quantizer in order.

    Args:
        quantizers: those that come first take their nodes first.
    """

    def __init__(self, quantizers: list[Quantizer]) -> None:
        super().__init__()
        self.quantizers = quantizers

    def transform_for_annotation(self, model: fx.GraphModule) -> fx.GraphModule:
        """See `Quantizer`."""
        for quantizer in self.quantizers:
            model = quantizer.transform_for_annotation(model)
        return model

    def annotate(self, model: fx.GraphModule) -> fx.GraphModule:
        """See `Quantizer`.

        Raises:
            PlanError: if a quantizer changes what another one annotated.
        """
        taken: dict[fx.Node, tuple[Any, str]] = {}
        for quantizer in self.quantizers:
            quantizer.annotate(model)
            me = type(quantizer).__name__
            for node in model.graph.nodes:
                annotation = node.meta.get(ANNOTATION)
                if annotation is None:
                    continue
                state = (id(annotation), dict(annotation.input_qspec_map), annotation.output_qspec)
                before, whose = taken.setdefault(node, (state, me))
                if before != state:
                    raise PlanError(
                        f"{me} changes what {whose} annotated",
                        site=node.name,
                        hint="Let it heed `_annotated`.",
                    )
        return model

    def validate(self, model: fx.GraphModule) -> None:
        """See `Quantizer`."""
        for quantizer in self.quantizers:
            quantizer.validate(model)

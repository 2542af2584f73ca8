"""`EmbeddingQuantizer`: tables of 8-bit codes with one scale and zero point per row."""

from __future__ import annotations

import torch
from torch import fx

from pennyweight.compat.quantization.quantizer.annotators import (
    Named,
    QuantizationConfig,
    annotate_chain,
    is_annotated,
    kind_of,
)
from pennyweight.compat.quantization.quantizer.quantizer import QuantizationSpec, Quantizer


def get_embedding_operators_config() -> QuantizationConfig:
    """uint8 codes with a float zero point per row."""
    weight = QuantizationSpec(
        torch.uint8,
        Named("PerChannelMinMaxObserver"),
        0,
        255,
        torch.per_channel_affine_float_qparams,
        ch_axis=0,
    )
    return QuantizationConfig(None, None, weight, None)


class EmbeddingQuantizer(Quantizer):
    """Every `nn.Embedding`."""

    def annotate(self, model: fx.GraphModule) -> fx.GraphModule:
        """See `Quantizer`."""
        config = get_embedding_operators_config()
        for node in model.graph.nodes:
            if kind_of(node) == "embedding" and not is_annotated([node]):
                annotate_chain([node], {node.args[0]: config.weight}, None)
        return model

    def validate(self, model: fx.GraphModule) -> None:
        """Nothing."""

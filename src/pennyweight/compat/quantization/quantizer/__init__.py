"""Quantizers of exported graphs, and what they annotate nodes with."""

from pennyweight.compat.quantization.quantizer.composable_quantizer import ComposableQuantizer
from pennyweight.compat.quantization.quantizer.embedding_quantizer import EmbeddingQuantizer
from pennyweight.compat.quantization.quantizer.quantizer import (
    DerivedQuantizationSpec,
    EdgeOrNode,
    FixedQParamsQuantizationSpec,
    QuantizationAnnotation,
    QuantizationSpec,
    QuantizationSpecBase,
    Quantizer,
    SharedQuantizationSpec,
)
from pennyweight.compat.quantization.quantizer.x86_inductor_quantizer import X86InductorQuantizer
from pennyweight.compat.quantization.quantizer.xnnpack_quantizer import XNNPACKQuantizer

__all__ = [
    "ComposableQuantizer", "DerivedQuantizationSpec", "EdgeOrNode", "EmbeddingQuantizer",
    "FixedQParamsQuantizationSpec",
    "QuantizationAnnotation", "QuantizationSpec", "QuantizationSpecBase", "Quantizer", "SharedQuantizationSpec",
    "X86InductorQuantizer", "XNNPACKQuantizer",
]  # fmt: skip

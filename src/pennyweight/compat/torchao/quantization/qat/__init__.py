"""Quantization-aware training of language models: quantizers with `prepare` and `convert`, and configurations."""

from pennyweight.compat.torchao.quantization.qat.api import (
    ComposableQATQuantizer,
    Int4WeightOnlyEmbeddingQATQuantizer,
    Int4WeightOnlyQATQuantizer,
    Int8DynActInt4WeightQATQuantizer,
    TwoStepQuantizer,
    disable_4w_fake_quant,
    disable_8da4w_fake_quant,
    enable_4w_fake_quant,
    enable_8da4w_fake_quant,
)
from pennyweight.compat.torchao.quantization.qat.config import (
    FakeQuantizeConfig,
    FromIntXQuantizationAwareTrainingConfig,
    IntxFakeQuantizeConfig,
    IntXQuantizationAwareTrainingConfig,
    QATConfig,
    QATStep,
    from_intx_quantization_aware_training,
    intx_quantization_aware_training,
)

__all__ = [
    "ComposableQATQuantizer",
    "FakeQuantizeConfig",
    "FromIntXQuantizationAwareTrainingConfig",
    "Int4WeightOnlyEmbeddingQATQuantizer",
    "Int4WeightOnlyQATQuantizer",
    "Int8DynActInt4WeightQATQuantizer",
    "IntXQuantizationAwareTrainingConfig",
    "IntxFakeQuantizeConfig",
    "QATConfig",
    "QATStep",
    "TwoStepQuantizer",
    "disable_4w_fake_quant",
    "disable_8da4w_fake_quant",
    "enable_4w_fake_quant",
    "enable_8da4w_fake_quant",
    "from_intx_quantization_aware_training",
    "intx_quantization_aware_training",
]

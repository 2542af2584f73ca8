"""`torchao.quantization`: configurations, `quantize_` and the trained schemes of language models."""

from __future__ import annotations

from typing import Any

from pennyweight.compat.torchao.quantization import qat
from pennyweight.compat.torchao.quantization.granularity import (
    Granularity,
    PerAxis,
    PerGroup,
    PerRow,
    PerTensor,
    PerToken,
)
from pennyweight.compat.torchao.quantization.quant_api import (
    AOBaseConfig,
    Int4WeightOnlyConfig,
    Int8DynamicActivationInt4WeightConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8DynamicActivationIntxWeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    int4_weight_only,
    int8_dynamic_activation_int4_weight,
    int8_dynamic_activation_int8_weight,
    int8_weight_only,
    quantize_,
)
from pennyweight.errors import PennyweightError

_ELSEWHERE = {
    "autoquant": "pw.tune is planned; until then compare recipes with `pennyweight bench`.",
    "Float8WeightOnlyConfig": "fp8 grids are planned; Int8WeightOnlyConfig is as small.",
    "Float8DynamicActivationFloat8WeightConfig": "fp8 grids are planned; int8 runs now.",
    "float8_weight_only": "fp8 grids are planned; int8_weight_only() is as small.",
    "UIntXWeightOnlyConfig": "IntxWeightOnlyConfig has 2 to 8 bits.",
    "FPXWeightOnlyConfig": "Floating-point grids are planned; IntxWeightOnlyConfig has 2 to 8 bits.",
    "smooth_fq_linear_to_inference": "SmoothQuant is planned as a pass.",
    "swap_conv2d_1x1_to_linear": "Convolutions are quantized as they are: pw.quantize(model, batches).",
}

__all__ = [
    "AOBaseConfig",
    "Granularity",
    "Int4WeightOnlyConfig",
    "Int8DynamicActivationInt4WeightConfig",
    "Int8DynamicActivationInt8WeightConfig",
    "Int8DynamicActivationIntxWeightConfig",
    "Int8WeightOnlyConfig",
    "IntxWeightOnlyConfig",
    "PerAxis",
    "PerGroup",
    "PerRow",
    "PerTensor",
    "PerToken",
    "int4_weight_only",
    "int8_dynamic_activation_int4_weight",
    "int8_dynamic_activation_int8_weight",
    "int8_weight_only",
    "qat",
    "quantize_",
]


def __getattr__(name: str) -> Any:
    if name in _ELSEWHERE:
        raise PennyweightError(f"torchao's {name} has no counterpart here", hint=_ELSEWHERE[name])
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""`torch.ao.quantization` as it was. Each name is fetched from its module when it is first asked for."""

from __future__ import annotations

from importlib import import_module
from typing import Any

# functions of the names of their modules: bound here, before an import of the module can take the name
from pennyweight.compat.quantization.fuse_modules import fuse_modules as fuse_modules
from pennyweight.compat.quantization.quantize import quantize as quantize
from pennyweight.errors import nearest

_NAMES = {
    "pt2e.export_utils": "allow_exported_model_train_eval move_exported_model_to_eval move_exported_model_to_train",
    "quantize_pt2e": "prepare_pt2e prepare_qat_pt2e convert_pt2e",
    "quantize": """prepare prepare_qat convert quantize quantize_qat quantize_dynamic propagate_qconfig_
        add_quant_dequant freeze_bn_stats update_bn_stats get_observer_state_dict load_observer_state_dict""",
    "quantize_fx": "prepare_fx prepare_qat_fx convert_fx fuse_fx convert_to_reference_fx",
    "fuse_modules": "fuse_modules fuse_modules_qat",
    "stubs": "QuantStub DeQuantStub QuantWrapper",
    "_backend": "set_backend",
    "qconfig": """QConfig QConfigDynamic QConfigAny default_qconfig default_debug_qconfig default_per_channel_qconfig
        default_dynamic_qconfig per_channel_dynamic_qconfig float16_dynamic_qconfig float16_static_qconfig
        float_qparams_weight_only_qconfig float_qparams_weight_only_qconfig_4bit default_weight_only_qconfig
        default_activation_only_qconfig default_qat_qconfig default_qat_qconfig_v2 default_dynamic_qat_qconfig
        default_embedding_qat_qconfig default_symmetric_qnnpack_qconfig default_symmetric_qnnpack_qat_qconfig
        default_per_channel_symmetric_qnnpack_qconfig default_per_channel_symmetric_qnnpack_qat_qconfig
        get_default_qconfig get_default_qat_qconfig get_default_qconfig_dict get_default_qat_qconfig_dict
        qconfig_equals""",
    "qconfig_mapping": """QConfigMapping get_default_qconfig_mapping get_default_qat_qconfig_mapping
        get_symmetric_qnnpack_qconfig_mapping get_symmetric_qnnpack_qat_qconfig_mapping""",
    "observer": """ObserverBase MinMaxObserver MovingAverageMinMaxObserver PerChannelMinMaxObserver
        MovingAveragePerChannelMinMaxObserver HistogramObserver PlaceholderObserver NoopObserver ReuseInputObserver
        FixedQParamsObserver RecordingObserver default_observer default_weight_observer default_histogram_observer
        default_per_channel_weight_observer per_channel_weight_observer_range_neg_127_to_127
        weight_observer_range_neg_127_to_127 default_dynamic_quant_observer default_float_qparams_observer
        default_float_qparams_observer_4bit default_placeholder_observer default_debug_observer
        default_reuse_input_observer default_symmetric_fixed_qparams_observer default_affine_fixed_qparams_observer""",
    "fake_quantize": """FakeQuantizeBase FakeQuantize FusedMovingAvgObsFakeQuantize FixedQParamsFakeQuantize
        default_fake_quant default_weight_fake_quant default_dynamic_fake_quant default_per_channel_weight_fake_quant
        default_histogram_fake_quant default_embedding_fake_quant default_embedding_fake_quant_4bit
        default_fused_act_fake_quant default_fused_wt_fake_quant default_fused_per_channel_wt_fake_quant
        fused_wt_fake_quant_range_neg_127_to_127 fused_per_channel_wt_fake_quant_range_neg_127_to_127
        default_symmetric_fixed_qparams_fake_quant default_affine_fixed_qparams_fake_quant enable_fake_quant
        disable_fake_quant enable_observer disable_observer""",
}
_PLACES = {name: place for place, names in _NAMES.items() for name in names.split()}
_MODULES = """backend_config fake_quantize fx observer pt2e qconfig qconfig_mapping quantize_fx quantize_pt2e quantizer
    stubs""".split()
__all__ = sorted(_PLACES)  # for `import *`, which asks for each


def __getattr__(name: str) -> Any:
    """Fetch a public name from its module, or a module, once."""
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    if name not in _PLACES:
        raise AttributeError(f"{__name__} has no {name!r}. {nearest(name, _PLACES, 'public names')}")
    value = getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PLACES})

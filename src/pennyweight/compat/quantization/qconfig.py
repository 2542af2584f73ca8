"""`QConfig`: constructors of what stands at a layer's inputs and at its weight."""

from __future__ import annotations

import warnings
from collections import namedtuple
from typing import Any

import torch
from torch import nn

from pennyweight.compat.quantization import fake_quantize as fq
from pennyweight.compat.quantization import observer as ob
from pennyweight.errors import InputError, nearest

BACKENDS = ("fbgemm", "x86", "onednn", "qnnpack", "xnnpack")


class QConfig(namedtuple("QConfig", ["activation", "weight"])):
    """What a layer's activations and weight get: classes, or `with_args` of them, never instances.

    Raises:
        InputError: on instances.
    """

    __slots__ = ()

    def __new__(cls, activation: Any, weight: Any) -> QConfig:
        """Check and make."""
        if isinstance(activation, nn.Module) or isinstance(weight, nn.Module):
            raise InputError(
                "QConfig takes classes of observers, not instances",
                hint="Use MyObserver.with_args(x=1), or pass the class itself.",
            )
        return super().__new__(cls, activation, weight)


class QConfigDynamic(QConfig):
    """Old name of a `QConfig` whose activation is ranged at run time."""

    def __new__(cls, activation: Any = torch.nn.Identity, weight: Any = torch.nn.Identity) -> QConfigDynamic:
        """Check and make."""
        warnings.warn("QConfigDynamic is QConfig with a dynamic activation", DeprecationWarning, stacklevel=2)
        made: Any = super().__new__(cls, ob.default_dynamic_quant_observer, weight)
        return made  # type: ignore[no-any-return]


default_qconfig = QConfig(ob.default_observer, ob.default_weight_observer)
default_debug_qconfig = QConfig(ob.default_debug_observer, ob.default_weight_observer)
default_per_channel_qconfig = QConfig(ob.default_observer, ob.default_per_channel_weight_observer)
default_dynamic_qconfig = QConfig(ob.default_dynamic_quant_observer, ob.default_weight_observer)
per_channel_dynamic_qconfig = QConfig(
    ob.default_dynamic_quant_observer, ob.default_per_channel_weight_observer
)
float16_dynamic_qconfig = QConfig(
    ob.PlaceholderObserver.with_args(dtype=torch.float16, is_dynamic=True),
    ob.PlaceholderObserver.with_args(dtype=torch.float16),
)
float16_static_qconfig = QConfig(
    ob.PlaceholderObserver.with_args(dtype=torch.float16),
    ob.PlaceholderObserver.with_args(dtype=torch.float16),
)
float_qparams_weight_only_qconfig = QConfig(
    ob.default_placeholder_observer, ob.default_float_qparams_observer
)
float_qparams_weight_only_qconfig_4bit = QConfig(
    ob.default_placeholder_observer, ob.default_float_qparams_observer_4bit
)
default_weight_only_qconfig = QConfig(torch.nn.Identity, fq.default_weight_fake_quant)
default_activation_only_qconfig = QConfig(fq.default_fake_quant, torch.nn.Identity)
default_qat_qconfig = QConfig(fq.default_fake_quant, fq.default_weight_fake_quant)
default_qat_qconfig_v2 = QConfig(fq.default_fused_act_fake_quant, fq.default_fused_wt_fake_quant)
default_dynamic_qat_qconfig = QConfig(fq.default_dynamic_fake_quant, fq.default_weight_fake_quant)
default_embedding_qat_qconfig = QConfig(
    ob.NoopObserver.with_args(dtype=torch.float32), fq.default_embedding_fake_quant
)
default_symmetric_qnnpack_qconfig = QConfig(
    ob.HistogramObserver.with_args(dtype=torch.qint8, reduce_range=False, eps=2**-12),
    ob.weight_observer_range_neg_127_to_127,
)
default_per_channel_symmetric_qnnpack_qconfig = QConfig(
    ob.HistogramObserver.with_args(dtype=torch.qint8, reduce_range=False, eps=2**-12),
    ob.per_channel_weight_observer_range_neg_127_to_127,
)
_SIGNED = {
    "observer": ob.MovingAverageMinMaxObserver,
    "quant_min": -128,
    "quant_max": 127,
    "dtype": torch.qint8,
}
default_symmetric_qnnpack_qat_qconfig = QConfig(
    fq.FusedMovingAvgObsFakeQuantize.with_args(**_SIGNED, eps=2**-12),
    fq.fused_wt_fake_quant_range_neg_127_to_127,
)
default_per_channel_symmetric_qnnpack_qat_qconfig = QConfig(
    fq.FusedMovingAvgObsFakeQuantize.with_args(**_SIGNED, eps=2**-12),
    fq.fused_per_channel_wt_fake_quant_range_neg_127_to_127,
)
QConfigAny = QConfig | None


def _known(backend: str) -> None:
    if backend not in BACKENDS:
        raise InputError(f"backend {backend!r} is unknown", hint=nearest(backend, BACKENDS, "backends"))


def get_default_qconfig(backend: str = "x86", version: int = 0) -> QConfig:
    """What a backend's rules are after training.

    fbgemm, x86, onednn: histogram ranges, weights per channel. qnnpack: weights per tensor. xnnpack: int8 activations
    and weights within -127 .. 127 per channel. `reduce_range`, which the first two had, is not needed by kernels that
    do not saturate.

    Raises:
        InputError: on other names.
    """
    _known(backend)
    if backend == "qnnpack":
        return QConfig(ob.HistogramObserver.with_args(reduce_range=False), ob.default_weight_observer)
    if backend == "xnnpack":
        return default_per_channel_symmetric_qnnpack_qconfig
    return QConfig(
        ob.HistogramObserver.with_args(reduce_range=backend in ("fbgemm", "x86")),
        ob.default_per_channel_weight_observer,
    )


def get_default_qat_qconfig(backend: str = "x86", version: int | None = 1) -> QConfig:
    """What a backend's rules are in training; see `get_default_qconfig`.

    Raises:
        InputError: on other names.
    """
    _known(backend)
    act = fq.FakeQuantize if version == 0 else fq.FusedMovingAvgObsFakeQuantize
    signal = act.with_args(
        observer=ob.MovingAverageMinMaxObserver, quant_min=0, quant_max=255,
        reduce_range=backend in ("fbgemm", "x86"),
    )  # fmt: skip
    if backend == "qnnpack":
        return QConfig(
            signal, fq.default_weight_fake_quant if version == 0 else fq.default_fused_wt_fake_quant
        )
    if backend == "xnnpack":
        return default_per_channel_symmetric_qnnpack_qat_qconfig
    weight = (
        fq.default_per_channel_weight_fake_quant
        if version == 0
        else fq.default_fused_per_channel_wt_fake_quant
    )
    return QConfig(signal, weight)


def get_default_qconfig_dict(backend: str = "x86", version: int = 0) -> dict[str, Any]:
    """The old dictionary form."""
    return {"": get_default_qconfig(backend, version)}


def get_default_qat_qconfig_dict(backend: str = "x86", version: int = 1) -> dict[str, Any]:
    """The old dictionary form."""
    return {"": get_default_qat_qconfig(backend, version)}


def qconfig_equals(q1: QConfigAny, q2: QConfigAny) -> bool:
    """Whether two say the same."""
    return q1 == q2

"""Fake-quantizers: descriptions for training. Called by themselves they observe and round with a gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pennyweight import kernels as kernels
from pennyweight.compat.quantization import _lazy
from pennyweight.compat.quantization.observer import (
    Configurable,
    FixedQParamsObserver,
    HistogramObserver,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    ObserverBase,
    default_affine_fixed_qparams_observer,
    default_symmetric_fixed_qparams_observer,
)
from pennyweight.gradients.affine import bounds
from pennyweight.nn.fake import Quantizer


class FakeQuantizeBase(Configurable):
    """Two switches: whether it observes, whether it rounds."""

    def __init__(self) -> None:
        super().__init__()
        self.observing, self.rounding = True, True

    def enable_fake_quant(self, enabled: bool = True) -> None:
        """Round from now on."""
        self.rounding = enabled

    def disable_fake_quant(self) -> None:
        """Let values through."""
        self.rounding = False

    def enable_observer(self, enabled: bool = True) -> None:
        """Let ranges follow."""
        self.observing = enabled

    def disable_observer(self) -> None:
        """Let ranges stay."""
        self.observing = False


class FakeQuantize(FakeQuantizeBase):
    """An observer, and rounding under what it says.

    Args:
        observer: class of the observer.
        quant_min: least code.
        quant_max: greatest code.
        is_dynamic: range values at run time.
        observer_kwargs: arguments of the observer.
    """

    def __init__(
        self,
        observer: Any = MovingAverageMinMaxObserver,
        quant_min: int | None = None,
        quant_max: int | None = None,
        is_dynamic: bool = False,
        **observer_kwargs: Any,
    ) -> None:
        super().__init__()
        self.activation_post_process: ObserverBase = observer(
            quant_min=quant_min, quant_max=quant_max, is_dynamic=is_dynamic, **observer_kwargs
        )

    def __getattr__(self, name: str) -> Any:
        if name in (
            "dtype",
            "qscheme",
            "quant_min",
            "quant_max",
            "ch_axis",
            "is_dynamic",
            "averaging_constant",
        ):
            return getattr(self.activation_post_process, name)
        return super().__getattr__(name)

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Of the observer."""
        return self.activation_post_process.calculate_qparams()

    def forward(self, x: Tensor) -> Tensor:
        """Observe, then `(clamp(rint(x / s) + z, qmin, qmax) - z) s`, gradient 1 inside and 0 outside."""
        observer = self.activation_post_process
        if self.observing:
            observer(x.detach())
        if not self.rounding:
            return x
        scale, zero = observer.calculate_qparams()
        spec = observer.spec()
        low, high = bounds(spec)
        offset = zero.float() if spec.zero == "int" else torch.zeros_like(scale)
        axis = observer.ch_axis or 0
        rows = x if scale.numel() == 1 else x.movedim(axis, 0).contiguous()
        y: Tensor = torch.ops.pennyweight.fake_quantize(
            rows, scale, offset, float(low), float(high), 0.0, 1.0, 0
        )
        return y if scale.numel() == 1 else y.movedim(0, axis)


class FusedMovingAvgObsFakeQuantize(FakeQuantize):
    """The same in one pass over memory, which ours is anyway."""


class FixedQParamsFakeQuantize(FakeQuantize):
    """Rounding under known parameters."""

    def __init__(self, observer: Any = FixedQParamsObserver, **kwargs: Any) -> None:
        FakeQuantizeBase.__init__(self)
        self.activation_post_process = observer(**kwargs)


_ACT: dict[str, Any] = {"observer": MovingAverageMinMaxObserver, "quant_min": 0, "quant_max": 255}
_W: dict[str, Any] = {"quant_min": -128, "quant_max": 127, "dtype": torch.qint8}
default_fake_quant = FakeQuantize.with_args(
    **_ACT, dtype=torch.quint8, qscheme=torch.per_tensor_affine, reduce_range=True
)
default_weight_fake_quant = FakeQuantize.with_args(
    observer=MovingAverageMinMaxObserver, **_W, qscheme=torch.per_tensor_symmetric
)
default_dynamic_fake_quant = FakeQuantize.with_args(
    **_ACT, is_dynamic=True, dtype=torch.quint8, averaging_constant=1
)
default_per_channel_weight_fake_quant = FakeQuantize.with_args(
    observer=MovingAveragePerChannelMinMaxObserver, **_W, qscheme=torch.per_channel_symmetric, ch_axis=0
)
default_histogram_fake_quant = FakeQuantize.with_args(
    observer=HistogramObserver,
    quant_min=0,
    quant_max=255,
    dtype=torch.quint8,
    qscheme=torch.per_tensor_affine,
)
default_embedding_fake_quant = FakeQuantize.with_args(
    observer=MovingAveragePerChannelMinMaxObserver, qscheme=torch.per_channel_affine_float_qparams,
    dtype=torch.quint8, quant_min=0, quant_max=255, ch_axis=0,
)  # fmt: skip
default_embedding_fake_quant_4bit = default_embedding_fake_quant.with_args(
    dtype=torch.quint4x2, quant_min=0, quant_max=15
)
default_fused_act_fake_quant = FusedMovingAvgObsFakeQuantize.with_args(**_ACT, dtype=torch.quint8)
default_fused_wt_fake_quant = FusedMovingAvgObsFakeQuantize.with_args(
    observer=MovingAverageMinMaxObserver, **_W, qscheme=torch.per_tensor_symmetric
)
default_fused_per_channel_wt_fake_quant = FusedMovingAvgObsFakeQuantize.with_args(
    observer=MovingAveragePerChannelMinMaxObserver, **_W, qscheme=torch.per_channel_symmetric
)
fused_wt_fake_quant_range_neg_127_to_127 = default_fused_wt_fake_quant.with_args(quant_min=-127, eps=2**-12)
fused_per_channel_wt_fake_quant_range_neg_127_to_127 = default_fused_per_channel_wt_fake_quant.with_args(
    quant_min=-127, eps=2**-12
)
default_symmetric_fixed_qparams_fake_quant = FixedQParamsFakeQuantize.with_args(
    observer=default_symmetric_fixed_qparams_observer
)
default_affine_fixed_qparams_fake_quant = FixedQParamsFakeQuantize.with_args(
    observer=default_affine_fixed_qparams_observer
)


def _switch(module: nn.Module, name: str, on: bool) -> None:
    if isinstance(module, Quantizer):
        _lazy.switch(module, name, on)
    elif isinstance(module, FakeQuantizeBase):
        setattr(module, name, on)
    else:
        _lazy.remember(module, name, on)


def enable_fake_quant(mod: nn.Module) -> None:
    """For `model.apply`: round from now on."""
    _switch(mod, "rounding", True)


def disable_fake_quant(mod: nn.Module) -> None:
    """For `model.apply`: let values through."""
    _switch(mod, "rounding", False)


def enable_observer(mod: nn.Module) -> None:
    """For `model.apply`: let ranges follow what is seen."""
    _switch(mod, "observing", True)


def disable_observer(mod: nn.Module) -> None:
    """For `model.apply`: let ranges stay as they are."""
    _switch(mod, "observing", False)

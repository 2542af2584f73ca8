"""Observers: descriptions of a grid and of how its range is found.

In a `QConfig` they say what a site gets; called by themselves they find ranges through the package's own statistics.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pennyweight.compat.quantization import _specs
from pennyweight.errors import EmptyCalibration
from pennyweight.qtensor import QParams
from pennyweight.ranges import params_of_range, ranges
from pennyweight.spec import QuantSpec
from pennyweight.stats import Statistic, stats


class _Partial:
    """A class with some arguments filled in; what `with_args` gives."""

    def __init__(
        self, p: functools.partial[Any], callables: dict[str, Callable[[], Any]] | None = None
    ) -> None:
        self.p, self.callables = p, dict(callables or {})

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        made = {name: make() for name, make in self.callables.items() if name not in kwargs}
        return self.p(*args, **made, **kwargs)

    def with_args(self, **kwargs: Any) -> _Partial:
        """The same with further arguments."""
        return _Partial(functools.partial(self.p, **kwargs), self.callables)

    def with_callable_args(self, **kwargs: Callable[[], Any]) -> _Partial:
        """The same with arguments that are made at every call."""
        return _Partial(self.p, {**self.callables, **kwargs})

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, _Partial)
            and (self.p.func, self.p.args, self.p.keywords) == (other.p.func, other.p.args, other.p.keywords)
            and self.callables == other.callables
        )

    def __hash__(self) -> int:
        return hash(self.p.func)

    def __repr__(self) -> str:
        filled = ", ".join(f"{k}={getattr(v, '__name__', v)}" for k, v in self.p.keywords.items())
        return f"{self.p.func.__name__}({filled})"


class Configurable(nn.Module):
    """What observers and fake-quantizers share: classes that are configured before they are made."""

    @classmethod
    def with_args(cls, **kwargs: Any) -> _Partial:
        """This class with arguments filled in."""
        return _Partial(functools.partial(cls, **kwargs))

    @classmethod
    def with_callable_args(cls, **kwargs: Callable[[], Any]) -> _Partial:
        """This class with arguments that are made at every call."""
        return _Partial(functools.partial(cls), kwargs)


class ObserverBase(Configurable):
    """Sees values, then tells scale and zero point.

    Args:
        dtype: of the codes.
        qscheme: torch.per_tensor_affine and its like.
        reduce_range: accepted, not needed: no kernel of ours saturates an intermediate.
        quant_min: least code; that of dtype by default.
        quant_max: greatest code.
        eps: accepted; a scale of zero becomes one.
        is_dynamic: range values at run time.
        ch_axis: axis of the channels, where there is a scale for each.
        averaging_constant: rate of moving averages.
    """

    statistic: ClassVar[str] = "minmax"
    per_channel: ClassVar[bool] = False

    def __init__(
        self,
        dtype: torch.dtype = torch.quint8,
        qscheme: Any = torch.per_tensor_affine,
        reduce_range: bool = False,
        quant_min: int | None = None,
        quant_max: int | None = None,
        eps: float = 2**-23,
        is_dynamic: bool = False,
        ch_axis: int | None = None,
        averaging_constant: float = 0.01,
        **ignored: Any,
    ) -> None:
        super().__init__()
        self.dtype, self.qscheme, self.reduce_range = dtype, qscheme, reduce_range
        self.quant_min, self.quant_max, self.eps, self.is_dynamic = quant_min, quant_max, eps, is_dynamic
        self.ch_axis, self.averaging_constant, self.options = ch_axis, averaging_constant, ignored
        self.seen: Statistic | None = None
        self.ends: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Take `x` in; returns it."""
        if self.per_channel:
            axis = self.ch_axis or 0
            rows = x.detach().float().movedim(axis, 0).flatten(1)
            self.ends = self._joined(rows.amin(1), rows.amax(1))
        else:
            if self.seen is None:
                self.seen = stats[self.statistic]()
                if hasattr(self.seen, "rate"):
                    self.seen.rate = self.averaging_constant
            self.seen.update(x)
        return x

    def _joined(self, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
        if self.ends is None:
            return lo, hi
        old_lo, old_hi = self.ends
        if self.statistic == "moving_minmax":
            rate = self.averaging_constant
            return old_lo + rate * (lo - old_lo), old_hi + rate * (hi - old_hi)
        return torch.minimum(old_lo, lo), torch.maximum(old_hi, hi)

    def spec(self) -> QuantSpec:
        """The grid, one scale per tensor.

        Raises:
            UnrealisableSite: if there is none such.
        """
        low, high = _specs.limits(self, type(self).__name__) or (-128, 127)
        symmetric = self.qscheme in (torch.per_tensor_symmetric, torch.per_channel_symmetric)
        bits = (high - low).bit_length()
        narrow = "n" if symmetric and low == -high else ""
        return QuantSpec(
            f"{'int' if low < 0 or symmetric else 'uint'}{bits}{narrow}", (), "none" if symmetric else "int"
        )

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point, [1] or [channels].

        Raises:
            EmptyCalibration: if no value was seen.
        """
        params = self._params()
        zero = torch.zeros_like(params.scale) if params.zero is None else params.zero
        if params.zero is None and self.dtype in (torch.quint8, torch.uint8):
            zero = zero + 128  # symmetric codes of an unsigned type
        return params.scale.reshape(-1), zero.reshape(-1).to(torch.int64)

    def _params(self) -> QParams:
        if self.ends is not None:
            return params_of_range(*self.ends, self.spec())
        if self.seen is None or not self.seen.count:
            raise EmptyCalibration(
                f"this {type(self).__name__} has seen no value", hint="Call it on data first."
            )
        if self.statistic != "histogram":
            return params_of_range(self.seen.lo, self.seen.hi, self.spec())
        rule = ranges[_specs.range_of(_Described(self))]
        return rule()(self.seen, self.spec())

    def extra_repr(self) -> str:
        """Type of the codes and scheme."""
        return f"{self.dtype}, {self.qscheme}"


class _Described:
    """An observer as a spec, for what reads specs."""

    def __init__(self, observer: nn.Module) -> None:
        self.observer_or_fake_quant_ctr = type(observer)


class MinMaxObserver(ObserverBase):
    """The extremes of everything seen."""


class MovingAverageMinMaxObserver(ObserverBase):
    """Moving averages of the batches' extremes."""

    statistic: ClassVar[str] = "moving_minmax"


class PerChannelMinMaxObserver(ObserverBase):
    """The extremes of every channel."""

    per_channel: ClassVar[bool] = True

    def __init__(self, ch_axis: int = 0, dtype: torch.dtype = torch.quint8,
                 qscheme: Any = torch.per_channel_affine, **kwargs: Any) -> None:  # fmt: skip
        super().__init__(dtype=dtype, qscheme=qscheme, ch_axis=ch_axis, **kwargs)


class MovingAveragePerChannelMinMaxObserver(PerChannelMinMaxObserver):
    """Moving averages of the extremes of every channel."""

    statistic: ClassVar[str] = "moving_minmax"


class HistogramObserver(ObserverBase):
    """The range of least squared error on a histogram."""

    statistic: ClassVar[str] = "histogram"

    def __init__(self, bins: int = 2048, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.bins = bins


class PlaceholderObserver(ObserverBase):
    """Says what is ranged at run time, or kept in a float type; sees nothing."""

    def __init__(self, dtype: torch.dtype = torch.float32, custom_op_name: str = "", compute_dtype: Any = None,
                 quant_min: int | None = None, quant_max: int | None = None, qscheme: Any = None,
                 eps: float | None = None, is_dynamic: bool = False) -> None:  # fmt: skip
        dynamic = is_dynamic or compute_dtype in (torch.quint8, torch.qint8)
        codes = dtype if compute_dtype is None or dtype != torch.float32 else compute_dtype
        scheme = qscheme or torch.per_tensor_affine
        super().__init__(codes, scheme, False, quant_min, quant_max, is_dynamic=dynamic)

    def forward(self, x: Tensor) -> Tensor:
        """Returns `x`."""
        return x


class NoopObserver(PlaceholderObserver):
    """Keeps a type: float16 weights."""

    def __init__(self, dtype: torch.dtype = torch.float16, custom_op_name: str = "") -> None:
        super().__init__(dtype)


class ReuseInputObserver(PlaceholderObserver):
    """What moves values shares the scale of its input; the plan ties such sites by itself."""

    def __init__(self) -> None:
        super().__init__(torch.quint8)


class FixedQParamsObserver(ObserverBase):
    """Scale and zero point are known."""

    def __init__(self, scale: float, zero_point: int, dtype: torch.dtype = torch.quint8,
                 qscheme: Any = torch.per_tensor_affine, quant_min: int = 0, quant_max: int = 255,
                 is_dynamic: bool = False, **kwargs: Any) -> None:  # fmt: skip
        super().__init__(dtype, qscheme, False, quant_min, quant_max, is_dynamic=is_dynamic, **kwargs)
        self.scale, self.zero_point = scale, zero_point

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """What was given."""
        return torch.tensor([self.scale]), torch.tensor([self.zero_point])


class RecordingObserver(ObserverBase):
    """Keeps what it sees, for inspection."""

    def __init__(self, dtype: torch.dtype = torch.quint8) -> None:
        super().__init__(dtype)
        self.tensor_val: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        """Take `x` in; returns it."""
        self.tensor_val.append(x.clone())
        return x

    def get_tensor_value(self) -> list[Tensor]:
        """Everything seen."""
        return self.tensor_val


_8 = {"dtype": torch.qint8, "qscheme": torch.per_tensor_symmetric}
_8C = {"dtype": torch.qint8, "qscheme": torch.per_channel_symmetric}
default_observer = MinMaxObserver.with_args(quant_min=0, quant_max=127)
default_weight_observer = MinMaxObserver.with_args(**_8)
default_histogram_observer = HistogramObserver.with_args(quant_min=0, quant_max=127)
default_per_channel_weight_observer = PerChannelMinMaxObserver.with_args(**_8C)
per_channel_weight_observer_range_neg_127_to_127 = default_per_channel_weight_observer.with_args(
    quant_min=-127, quant_max=127, eps=2**-12
)
weight_observer_range_neg_127_to_127 = default_weight_observer.with_args(
    quant_min=-127, quant_max=127, eps=2**-12
)
default_dynamic_quant_observer = PlaceholderObserver.with_args(
    dtype=torch.quint8, quant_min=0, quant_max=255, is_dynamic=True
)
default_float_qparams_observer = PerChannelMinMaxObserver.with_args(
    dtype=torch.quint8, qscheme=torch.per_channel_affine_float_qparams, ch_axis=0
)
default_float_qparams_observer_4bit = default_float_qparams_observer.with_args(dtype=torch.quint4x2)
default_placeholder_observer = PlaceholderObserver
default_debug_observer = RecordingObserver
default_reuse_input_observer = ReuseInputObserver
default_symmetric_fixed_qparams_observer = FixedQParamsObserver.with_args(
    scale=2.0 / 256.0, zero_point=128, dtype=torch.quint8, quant_min=0, quant_max=255
)
default_affine_fixed_qparams_observer = FixedQParamsObserver.with_args(
    scale=1.0 / 256.0, zero_point=0, dtype=torch.quint8, quant_min=0, quant_max=255
)

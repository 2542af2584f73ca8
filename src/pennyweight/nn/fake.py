"""The quantizer of one activation: observes, then rounds."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from pennyweight.errors import EmptyCalibration, NonFinite
from pennyweight.formats import grids
from pennyweight.qtensor import QParams
from pennyweight.ranges import RangeRule
from pennyweight.spec import QuantSpec
from pennyweight.stats import Statistic, stats
from pennyweight.stats.moments import Moments


class ActivationQuantizer(nn.Module):
    """Stands at one site. Off it is the identity; observing it feeds statistics; active it rounds.

        x' = (clamp(rint(x * r) + z, qmin, qmax) - z) * s,   r = float32(1 / s)

    Pseudo-gradient when active: 1 inside the range, 0 outside (clipped straight-through estimator).
    scale, zero: 0-d float32 buffers, NaN until calibrated. `axis` is where the channels of x are; sites without
    one keep no statistics by channel.
    """

    scale: Tensor
    zero: Tensor

    def __init__(self, spec: QuantSpec, site: str, axis: int | None = None) -> None:
        super().__init__()
        self.spec, self.site, self.axis = spec, site, axis
        self.statistics: dict[str, Statistic] = {}
        self.observing, self.active = False, False
        self.batches = 0
        self.register_buffer("scale", torch.tensor(float("nan")))
        self.register_buffer("zero", torch.tensor(float("nan")))

    def observe(self, needs: set[str]) -> None:
        """Collect these statistics from now on."""
        for name in needs:
            if self.axis is None and issubclass(stats[name], Moments):
                continue
            self.statistics.setdefault(name, stats[name]())
        self.observing = True

    def forward(self, x: Tensor) -> Tensor:
        """Any shape to the same shape."""
        if self.observing:
            self._update(x)
        if self.active:
            return fake_quantize_per_tensor(x, self.scale, self.zero, self.spec)
        return x

    def _update(self, x: Tensor) -> None:
        if x.numel() and not bool(torch.isfinite(x).all()):
            bad = int((~torch.isfinite(x)).sum())
            raise NonFinite(
                f"{bad} of {x.numel()} values are NaN or infinite in calibration batch {self.batches}",
                site=self.site,
                shapes=str(tuple(x.shape)),
                hint="Look at that batch, or at the layers before this site.",
            )
        for statistic in self.statistics.values():
            statistic.update(self._channels_second(x) if isinstance(statistic, Moments) else x)
        self.batches += 1

    def _channels_second(self, x: Tensor) -> Tensor:
        """[..., channels, ...] to [n, channels, ...]."""
        x = x.unsqueeze(0) if x.ndim == 1 else x
        return x if self.axis is None else x.movedim(self.axis, 1)

    def merge(self, other: ActivationQuantizer, names: Iterable[str] | None = None) -> None:
        """Take in what the same quantizer of another process has seen, or a tied one of statistics over all channels.

        Args:
            other: is left as it is.
            names: of the statistics to merge; all by default.
        """
        for name, statistic in other.statistics.items():
            if names is not None and name not in names:
                continue
            if name in self.statistics:
                self.statistics[name].merge(statistic)
            else:
                self.statistics[name] = type(statistic).from_state(statistic.state())

    def solve(self, rule: RangeRule) -> QParams:
        """Scale and zero point of what was seen.

        Raises:
            EmptyCalibration: if no value reached this site.
        """
        statistic = self.statistics.get(rule.needs)
        if statistic is None or statistic.count == 0:
            raise EmptyCalibration(
                "no calibration value reached this site",
                site=self.site,
                hint="Calibrate with inputs that take this branch, or keep the layer in float.",
            )
        return rule(statistic, self.spec)

    def set(self, params: QParams) -> None:
        """Use these parameters."""
        self.scale = params.scale.float().reshape(()).clone()
        self.zero = torch.zeros(()) if params.zero is None else params.zero.float().reshape(()).clone()

    @property
    def calibrated(self) -> bool:
        """Whether parameters are set."""
        return bool(torch.isfinite(self.scale))

    def extra_repr(self) -> str:
        """Spec and state, for printing."""
        return f"{self.spec}, scale={float(self.scale):.4g}, zero={float(self.zero):.4g}"


def bounds(spec: QuantSpec) -> tuple[int, int]:
    """Least and greatest code of an integer grid."""
    levels = grids[spec.grid].levels()
    return int(levels[0]), int(levels[-1])


def fake_quantize_per_tensor(x: Tensor, scale: Tensor, zero: Tensor, spec: QuantSpec) -> Tensor:
    """See `ActivationQuantizer`; differentiable in `x` by the clipped straight-through estimator."""
    low, high = bounds(spec)
    scaled = x * (1.0 / scale)
    clipped = torch.clamp(scaled, low - zero, high - zero)
    rounded = clipped + (torch.round(clipped) - clipped).detach()
    return rounded * scale

"""The quantizers of activations and weights: they observe, then round; in training, with a gradient."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from collections.abc import Set as Names
from typing import Any

import torch
from torch import Tensor, nn

from pennyweight.errors import CalibrationError, EmptyCalibration, NonFinite
from pennyweight.formats import grids
from pennyweight.formats.codebook import Codebook
from pennyweight.gradients import Estimator
from pennyweight.gradients.affine import bounds, rounded
from pennyweight.nn.ranks import agreed
from pennyweight.qtensor import QParams, QTensor, per_element, quantize
from pennyweight.ranges import TINY, RangeRule, params_of_range
from pennyweight.spec import QuantSpec
from pennyweight.stats import Statistic, stats
from pennyweight.stats.moments import Moments

_STORED = {"fp16": torch.float16, "bf16": torch.bfloat16, "e8m0": torch.float8_e8m0fnu}


class Quantizer(nn.Module):
    """Stands at one site; in training it rounds as its estimator says, with that estimator's gradient.

    Attributes:
        active: whether it rounds.
        following: whether ranges that are not learned follow what is seen, in train mode.
        estimator: how it trains; None where it does not.
        learned: the trained tensors by name.
        fresh: whether it has no range yet.
    """

    scale: Tensor
    zero: Tensor

    def __init__(self, spec: QuantSpec, site: str) -> None:
        super().__init__()
        self.spec, self.site = spec, site
        self.active, self.following, self.fresh = False, False, True
        self.estimator: Estimator | None = None
        self.learned = nn.ParameterDict()

    def held(self) -> Mapping[str, Tensor]:
        """Everything an estimator may read: scale, zero, and what is learned in their stead."""
        return {"scale": self.scale, "zero": self.zero, **dict(self.learned.items())}

    def set(self, params: QParams) -> None:
        """Use these parameters, and train on from them."""
        self._store(params)
        self.fresh = False
        if self.estimator is not None:
            for name, value in self.estimator.start(params, self.spec).items():
                value = value.reshape(-1) if value.ndim == 0 else value
                if name in self.learned:
                    self.learned[name].data.copy_(value.reshape(self.learned[name].shape))
                else:
                    self.learned[name] = nn.Parameter(value.float())

    def _store(self, params: QParams) -> None:
        self.scale = params.scale.detach().float().reshape(self.scale.shape).clone()
        zero = torch.zeros_like(self.scale) if params.zero is None else params.zero.detach().float()
        self.zero = zero.reshape(self.scale.shape).clone()

    def settle(self) -> None:
        """Write what is learned into scale and zero."""
        if self.learned and not self.fresh:
            self._store(self._learned_params())

    def _learned_params(self) -> QParams:
        """Scale and zero point as they are learned so far."""
        assert self.estimator is not None
        params = self.estimator.params({k: v.detach() for k, v in self.held().items()}, self.spec)
        return QParams(params.scale.abs().clamp_min(1e-12), params.zero)

    @property
    def calibrated(self) -> bool:
        """Whether parameters are set."""
        return bool(torch.isfinite(self.scale).all())

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.fresh = not self.calibrated


class ActivationQuantizer(Quantizer):
    """Stands at one site. Off it is the identity; observing it feeds statistics; active it rounds.

        x' = (clamp(rint(x * r) + z, qmin, qmax) - z) * s,   r = float32(1 / s)

    Pseudo-gradient when active: that of its estimator; without one 1 inside the range, 0 outside (clipped
    straight-through estimator). In training a range that is not learned follows the batches' extremes,

        lo <- lo + rate * (min x - lo),  hi likewise

    over all ranks of a process group. scale, zero: 0-d float32 buffers, NaN until there is a range; lo, hi likewise.
    `axis` is where the channels of x are; sites without one keep no statistics by channel.
    """

    lo: Tensor
    hi: Tensor

    def __init__(self, spec: QuantSpec, site: str, axis: int | None = None) -> None:
        super().__init__(spec, site)
        self.axis = axis
        self.statistics: dict[str, Statistic] = {}
        self.observing = False
        self.batches = 0
        self.rate = 0.01
        self.unconfirmed = False
        self.drop = 0.0  # share of the values that stay as they are, drawn anew in every run
        self.register_buffer("scale", torch.tensor(float("nan")))
        self.register_buffer("zero", torch.tensor(float("nan")))

    def train_through(self, estimator: Estimator, rate: float) -> None:
        """Round with a gradient from now on, in train and eval mode alike; ranges follow in train mode alone."""
        self.estimator, self.rate = estimator, rate
        self.active, self.following = True, True
        self.register_buffer("lo", torch.tensor(float("nan")))
        self.register_buffer("hi", torch.tensor(float("nan")))
        for name in estimator.start(QParams(torch.ones(()), torch.zeros(())), self.spec):
            self.learned[name] = nn.Parameter(torch.ones(1))

    def set(self, params: QParams) -> None:
        """Use these parameters; a sign has no range, and starts from scale 1."""
        super().set(self._signed(params))
        if self.estimator is not None:
            low, high = bounds(self.spec)
            self.lo, self.hi = (low - self.zero) * self.scale, (high - self.zero) * self.scale

    def _signed(self, params: QParams) -> QParams:
        return QParams(torch.ones_like(params.scale)) if self.spec.grid == "binary" else params

    def observe(self, needs: Names[str]) -> None:
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
        if self.estimator is None:
            if not self.active:
                return x
            y = self._whole(x, fake_quantize_per_tensor(x, self.scale, self.zero, self.spec))
            return torch.where(torch.rand(x.shape) < self.drop, x, y) if self.drop else y
        follows = not self.learned and self.spec.grid != "binary"  # a sign has no range
        if self.training and self.following and (self.fresh or follows):
            self._follow(x.detach())
        elif self.unconfirmed:
            self._confirm()
        if not self.active or self.fresh:
            return x
        count = x.numel() // x.shape[0] if x.ndim > 1 and x.shape[0] else x.numel()
        return self._whole(x, self.estimator.round(x, self.held(), self.spec, count))

    def _whole(self, x: Tensor, y: Tensor) -> Tensor:
        """y, x on its level; by way of whole units where levels are multiples of one: as kernels do it, in 8 bits.

        The gradient is that of y.
        """
        grid = grids[self.spec.grid]
        if not isinstance(grid, Codebook) or grid.multiples is None or grid.bits == 1:
            return y
        unit = self.settled_scale() * grid.unit
        codes = torch.clamp(torch.round(x.detach().float() * (1.0 / unit)) + grid.center, 0, 255)
        whole = (grid.rounding().to(x.device)[codes.nan_to_num(0).long()] - float(grid.center)) * unit
        return y + (whole.to(y.dtype) - y).detach() if y.requires_grad else whole.to(y.dtype)

    def settled_scale(self) -> Tensor:
        """The scale in use, 0-d: the learned one where it is learned."""
        return self._learned_params().scale.reshape(()) if self.learned else self.scale

    def _follow(self, x: Tensor) -> None:
        """Take a batch's range in: the first one, or into the average."""
        if not x.numel():
            return
        assert self.estimator is not None
        lo, hi = torch.aminmax(x.float())
        ends = agreed(torch.stack([-lo, hi]), "max")
        if not bool(torch.isfinite(ends).all()):
            raise NonFinite(
                "NaN or infinite values in training", site=self.site, shapes=str(tuple(x.shape)),
                hint="Look at the learning rate, or at the layers before this site.",
            )  # fmt: skip
        lo, hi = -ends[0], ends[1]
        if self.learned:  # a zero point belongs to the extremes; a step alone may come from all values
            params = self.estimator.first(x if self.spec.zero == "none" else torch.stack([lo, hi]), self.spec)
            self.set(QParams(agreed(params.scale, "mean"), params.zero))
            self.unconfirmed = True
            return
        if not self.fresh:
            lo, hi = self.lo + self.rate * (lo - self.lo), self.hi + self.rate * (hi - self.hi)
        self._store(self._signed(params_of_range(lo, hi, self.spec)))
        self.lo, self.hi, self.fresh = lo, hi, False

    def _confirm(self) -> None:
        """Whether the first range is still there at the second forward: a sharded parameter keeps no such write.

        Raises:
            CalibrationError: if it is not.
        """
        self.unconfirmed = False
        assert self.estimator is not None
        written = self.estimator.start(QParams(self.scale, self.zero), self.spec)
        if all(  # they began as ones, and one step of an optimizer does not carry them half the way
            bool(
                ((self.learned[name].detach() - 1).abs() < (self.learned[name].detach() - value).abs()).all()
            )
            for name, value in written.items()
        ):
            raise CalibrationError(
                "the first range of a learned quantizer was lost: its parameters are sharded",
                site=self.site,
                hint="Call pw.calibrate, or run one batch, before fully_shard.",
            )

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

    def extra_repr(self) -> str:
        """Spec and state, for printing."""
        return f"{self.spec}, scale={float(self.scale):.4g}, zero={float(self.zero):.4g}"


class WeightQuantizer(Quantizer):
    """Rounds a weight in training. Without a learned scale the range is that of the weight as it is.

    Once part of the weight is pinned (`pin`), that part is constant and the rest trains as it is, unrounded, under a
    range that stays. scale, zero: float32 buffers, `spec.scale_shape` of the matrix view. pinned: float32, of the
    matrix view, NaN where nothing is pinned; None before.
    """

    pinned: Tensor | None

    def __init__(self, spec: QuantSpec, site: str, matrix: Tensor, estimator: Estimator) -> None:
        super().__init__(spec, site)
        self.active, self.following = True, True
        self.penalty: Tensor | None = None
        self.dampened = False
        shape = spec.scale_shape(tuple(matrix.shape))
        self.register_buffer("scale", torch.ones(shape, device=matrix.device))
        self.register_buffer("zero", torch.zeros(shape, device=matrix.device))
        self.register_buffer("pinned", None)
        self.estimator: Estimator = estimator
        self.set(estimator.first(estimator.latent(matrix.detach()), spec))

    def forward(self, matrix: Tensor) -> Tensor:
        """[rows, columns] to the same, rounded."""
        if not self.active:
            return matrix
        if self.pinned is not None:
            return self.where_pinned(matrix, self.pinned)
        count = matrix.numel() // max(self.scale.numel(), 1)
        held = self._held(matrix)
        y = self.estimator.round(matrix, held, self.spec, count)
        if self.dampened:
            self.penalty = self._distance(matrix, y, held)
        return y

    def _held(self, matrix: Tensor) -> Mapping[str, Tensor]:
        held = dict(self.held())
        if not self.learned and self.following and self.pinned is None:
            params = self.estimator.first(self.estimator.latent(matrix.detach()), self.spec)
            if self.training:
                self._store(params)
            held["scale"] = params.scale
            held["zero"] = torch.zeros_like(params.scale) if params.zero is None else params.zero
        stored = _STORED.get(str(self.spec.scale))
        if stored is not None:
            scale = held["scale"]
            held["scale"] = scale + (scale.to(stored).float() - scale).detach()
        return held

    def _distance(self, matrix: Tensor, rounded: Tensor, held: Mapping[str, Tensor]) -> Tensor:
        """`sum (w' - clamp(w, s qmin, s qmax))^2`, a gradient into w alone. Nagel et al. 2022, equation 7."""
        low, high = bounds(self.spec)
        shape = self.spec.scale_shape(tuple(matrix.shape))
        params = self.estimator.params({k: v.detach() for k, v in held.items()}, self.spec)
        scale = params.scale.abs()
        zero = torch.zeros_like(scale) if params.zero is None else params.zero
        ends = [
            per_element(((code - zero) * scale).reshape(shape), tuple(matrix.shape)) for code in (low, high)
        ]
        latent = torch.minimum(torch.maximum(self.estimator.latent(matrix), ends[0]), ends[1])
        return ((rounded.detach() - latent) ** 2).sum()

    def pin(self, matrix: Tensor, where: Tensor) -> None:
        """Hold the values [rows, columns] where `where` says so at their levels; what is pinned already stays."""
        if self.pinned is None:  # from now on the range stays
            self.pinned = torch.full_like(matrix, float("nan"), dtype=torch.float32)
        levels = self.codes(matrix).dequantize()
        self.pinned = torch.where(where & torch.isnan(self.pinned), levels, self.pinned)

    @staticmethod
    def where_pinned(matrix: Tensor, pinned: Tensor) -> Tensor:
        """The matrix with what is pinned in place; no gradient there."""
        return torch.where(torch.isnan(pinned), matrix, pinned.to(matrix.dtype))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        saved = state_dict.get(f"{prefix}pinned")
        if saved is not None and self.pinned is None:
            self.pinned = torch.full_like(saved, float("nan"), device=self.scale.device)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def codes(self, matrix: Tensor) -> QTensor:
        """The weight as it is converted."""
        held = {k: v.detach() for k, v in self._held(matrix).items()}
        params = self.estimator.params(held, self.spec)
        zero = params.zero if self.spec.zero != "none" else None
        latent = self.estimator.latent(matrix.detach().float())
        if self.pinned is not None:
            latent = self.where_pinned(latent, self.pinned)
        return quantize(latent, self.spec, QParams(params.scale.abs().clamp_min(1e-12), zero))

    def extra_repr(self) -> str:
        """Spec, for printing."""
        return str(self.spec)


class RunTimeQuantizer(Quantizer):
    """Ranges every row, or the whole tensor, as it comes, and rounds it: training for dynamic activations.

        s = (hi - lo) / 255,  z = clamp(rint(-lo / s), 0, 255),  zero within [lo, hi];  dx'/dx = 1

    Per token over the last axis, unless the spec has one scale per tensor. Nothing is learned.
    """

    def __init__(self, spec: QuantSpec, site: str) -> None:
        super().__init__(spec, site)
        self.active = True
        self.register_buffer("scale", None)
        self.register_buffer("zero", None)

    def forward(self, x: Tensor) -> Tensor:
        """[..., n] to the same."""
        if not self.active or not x.numel():
            return x
        scale, zero = dynamic_params(x.detach(), not self.spec.per_tensor)
        y: Tensor = torch.ops.pennyweight.fake_quantize(
            x, scale.reshape(-1), zero.reshape(-1), 0.0, 255.0, 0.0, 1.0, 0
        )
        return y

    def settle(self) -> None:
        """Nothing to write."""

    def extra_repr(self) -> str:
        """Spec, for printing."""
        return f"{self.spec}, at run time"


def dynamic_params(x: Tensor, per_token: bool) -> tuple[Tensor, Tensor]:
    """Run-time scale and zero point: `s = (hi - lo) / 255`, `z = clamp(rint(-lo * r), 0, 255)`, zero in the range.

    Shapes: [..., 1] per token, 0-d else.
    """
    x = x.float()
    if per_token:
        lo, hi = torch.aminmax(x, dim=-1, keepdim=True)
    else:
        lo, hi = torch.aminmax(x) if x.numel() else (x.new_zeros(()), x.new_zeros(()))
    lo, hi = lo.clamp(max=0.0), hi.clamp(min=0.0)
    scale = (hi - lo) * (1.0 / 255.0)
    scale = torch.where(scale < TINY, torch.ones_like(scale), scale)
    zero = torch.round(-lo * (1.0 / scale)).clamp(0.0, 255.0)
    return scale, zero


def fake_quantize_per_tensor(x: Tensor, scale: Tensor, zero: Tensor, spec: QuantSpec) -> Tensor:
    """See `ActivationQuantizer`; differentiable in `x` by the clipped straight-through estimator.

    On grids of other levels `x' = s L(x / s)`, see `gradients.affine.leveled`.
    """
    return rounded(x, scale, zero, spec)

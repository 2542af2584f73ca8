"""Weights that bounce between two codes: pull them to the middle of one, or hold them there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from pennyweight.gradients.affine import bounds
from pennyweight.nn.conv import ConvTwin
from pennyweight.nn.fake import WeightQuantizer
from pennyweight.nn.linear import LinearTwin
from pennyweight.nn.rounding import trained
from pennyweight.qtensor import per_element


def rounded_weights(model: nn.Module) -> Iterator[tuple[Tensor, WeightQuantizer]]:
    """Weights of linear layers and convolutions, not transposed ones, with their quantizers.

    The matrix view of each is `weight.flatten(1)`.
    """
    for twin in model.modules():
        if isinstance(twin, LinearTwin | ConvTwin) and not getattr(twin, "transposed", False):
            for name, quantizer in trained(twin).items():
                yield getattr(twin, name), quantizer


def hold(weight: Tensor, where: Tensor, values: Tensor) -> None:
    """Write values into a weight where it is held; both [rows, columns] of its matrix view."""
    values = values.to(weight.dtype).reshape(weight.shape)
    weight.copy_(torch.where(where.reshape(weight.shape), values, weight))


def dampening_loss(model: nn.Module) -> Tensor:
    """`sum over layers |w' - clamp(w, s qmin, s qmax)|^2`, with a gradient into the weights alone.

    Add it times a factor that grows from 0 to about 0.1 on a cosine. Call it after the forward pass of the step; the
    first call switches its collection on and returns 0.

    Source: Nagel et al. 2022 (arXiv:2203.11086), section 4.1, equation 7.
    """
    total = torch.zeros(())
    for module in model.modules():
        if isinstance(module, WeightQuantizer):
            module.dampened = True
            if module.penalty is not None:
                total = total.to(module.penalty.device) + module.penalty
                module.penalty = None
    return total


@dataclass
class _Track:
    codes: Tensor
    direction: Tensor
    frequency: Tensor
    average: Tensor
    frozen: Tensor


@dataclass
class OscillationFreezing:
    """Iterative freezing: a weight whose code keeps jumping back and forth is held at the code it is at most.

        o_t = the code changed against its last change;  f_t = m o_t + (1 - m) f_(t-1);  frozen once f > threshold

    Call `step(model, threshold)` after every optimizer step. Linear and convolution layers only.

    Args:
        momentum: m.

    Source: Nagel et al. 2022 (arXiv:2203.11086), section 4.2, algorithm 1.
    """

    momentum: float = 0.01
    tracks: dict[str, _Track] = field(default_factory=dict)

    @torch.no_grad()
    def step(self, model: nn.Module, threshold: float) -> int:
        """Update frequencies, freeze what oscillates more than `threshold`, hold what is frozen.

        Returns the number of frozen weights.
        """
        return sum(self._track(quantizer, weight, threshold) for weight, quantizer in rounded_weights(model))

    def _track(self, quantizer: WeightQuantizer, weight: Tensor, threshold: float) -> int:
        matrix = weight.detach().flatten(1)
        q = quantizer.codes(matrix)
        codes, m = q.codes.float(), self.momentum
        track = self.tracks.get(quantizer.site)
        if track is None:
            zeros = torch.zeros_like(codes)
            self.tracks[quantizer.site] = _Track(codes, zeros, zeros.clone(), codes.clone(), zeros.bool())
            return 0
        change = torch.sign(codes - track.codes)
        against = (change * track.direction) < 0
        track.frequency.mul_(1 - m).add_(against.float(), alpha=m)
        track.average.mul_(1 - m).add_(codes, alpha=m)
        track.direction = torch.where(change != 0, change, track.direction)
        low, high = bounds(quantizer.spec)
        new = (track.frequency > threshold) & ~track.frozen
        track.codes = torch.where(track.frozen, track.codes, codes)
        track.codes = torch.where(new, torch.round(track.average).clamp(low, high), track.codes)
        track.frozen |= new
        if bool(track.frozen.any()):
            zero = torch.zeros_like(q.scales()) if q.zero is None else q.zero
            scale, zero = (per_element(t, tuple(matrix.shape)) for t in (q.scales(), zero))
            hold(weight, track.frozen, (track.codes - zero) * scale)
        return int(track.frozen.sum())

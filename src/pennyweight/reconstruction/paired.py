"""A layer's inputs in the network as quantized so far, beside those of the float network."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from pennyweight.reconstruction.capture import visit
from pennyweight.reconstruction.gram import layer_input, pieces, rounded_input
from pennyweight.solvers.retarget import retargeted

PULLS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)


@dataclass(frozen=True)
class Paired:
    """Sums over the inputs x~ of a layer as they come, and those x of the float network.

    Attributes:
        square: of x~ x~^T around their means, float64 [groups, in, in]; summed so, not as the difference of large sums,
            inputs that hardly differ have no negative variance.
        product: of x x~^T around theirs, the same shape.
        met, wanted: of x~ and of x, [groups, in].
        count: vectors.
    """

    square: Tensor
    product: Tensor
    met: Tensor
    wanted: Tensor
    count: int

    def __add__(self, other: Paired) -> Paired:
        """As of both; `S = Sa + Sb + d d^T na nb / n` with d the difference of means (Chan, Golub, LeVeque 1979)."""
        if not self.count or not other.count:
            return self if self.count else other
        count = self.count + other.count
        met, wanted = (
            a / self.count - b / other.count for a, b in ((self.met, other.met), (self.wanted, other.wanted))
        )
        between = met.unsqueeze(1) * (self.count * other.count / count)
        return Paired(
            self.square + other.square + met.unsqueeze(2) * between,
            self.product + other.product + wanted.unsqueeze(2) * between,
            self.met + other.met, self.wanted + other.wanted, count,
        )  # fmt: skip

    @cached_property
    def gram(self) -> Tensor:
        """The covariance of x~."""
        return self.square / self.count

    @cached_property
    def cross(self) -> Tensor:
        """That of x and x~, `E[x x~^T] - E[x] E[x~]^T`."""
        return self.product / self.count

    def shift(self, weight: Tensor, rounded: Tensor) -> Tensor:
        """What a bias needs so that results keep their mean, `W E[x] - W' E[x~]`, [out]."""
        want, have = ((_parts(w, self) @ v.unsqueeze(2)).flatten() / self.count
                      for w, v in ((weight, self.wanted), (rounded, self.met)))  # fmt: skip
        found: Tensor = (want - have).float()
        return found

    def errors(self, weight: Tensor, others: Iterable[Tensor]) -> list[float]:
        """Of each W': `E |W x - W' x~|^2` around its mean, less what W' leaves, `tr(W' H W'^T) - 2 tr(W G W'^T)`."""
        wanted = 2 * (_parts(weight, self) @ self.cross)
        return [
            float(((o @ self.gram - wanted) * o).sum()) for o in (_parts(other, self) for other in others)
        ]


def _parts(weight: Tensor, sums: Paired) -> Tensor:
    """[groups, rows, in]."""
    groups, size = sums.met.shape
    return weight.detach().double().reshape(groups, -1, size)


def seen_inputs(
    model: nn.Module, batches: Iterable[Any], twin: nn.Module, *, once: bool = True
) -> list[Tensor]:
    """The inputs of every call of a layer, as they come."""
    found: list[Tensor] = []
    visit(model, batches, twin, lambda args, kwargs: found.append(layer_input(args, kwargs)), once=once)
    return found


def paired(
    model: nn.Module, batches: Iterable[Any], twin: Any, floats: Sequence[Tensor], *, once: bool = True
) -> tuple[Paired, ...]:
    """Run a model as it is, and sum over a layer's inputs, rounded as its input is; two halves, or nothing without any.

    floats: from `seen_inputs` of the float network on the same batches.
    """
    none = Tensor()
    halves = [Paired(none, none, none, none, 0)] * 2
    others = iter(floats)

    def see(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        count, parts = pieces(twin, rounded_input(twin, args, kwargs))
        _, aims = pieces(twin, next(others).float())
        left = count // 2
        for x, wanted in zip(parts, aims, strict=True):
            cut = min(left, x.shape[1])
            for half, own in enumerate((slice(cut), slice(cut, None))):
                halves[half] = halves[half] + _sums(x[:, own], wanted[:, own])
            left -= cut

    visit(model, batches, twin, see, once=once)
    return tuple(halves) if any(h.count for h in halves) else ()


def _sums(x: Tensor, wanted: Tensor) -> Paired:
    count = x.shape[1]
    met, target = (v.sum(1).double() for v in (x, wanted))
    if count:
        x, wanted = (v - (m / count).float().unsqueeze(1) for v, m in ((x, met), (wanted, target)))
    return Paired((x.mT @ x).double(), (wanted.mT @ x).double(), met, target, count)


def steady_pull(weight: Tensor, halves: Sequence[Paired]) -> float:
    """The pull of `retarget` whose weight from one half of the inputs serves the other half best."""
    if any(not h.count for h in halves):
        return max(PULLS)
    one, other = halves
    tried = zip(*(judge.errors(weight, retargeted(weight, half.gram, half.cross, PULLS))
                  for half, judge in ((one, other), (other, one))), strict=True)  # fmt: skip
    errors = [sum(pair) for pair in tried]
    return PULLS[errors.index(min(errors))]

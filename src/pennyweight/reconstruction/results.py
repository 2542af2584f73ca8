"""What rounding does to a network's result, on a few batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from pennyweight.errors import EmptyCalibration


def first_batches(
    batches: Callable[[], Iterable[Any]] | None, what: str, samples: float = math.inf
) -> list[Any]:
    """Batches of the calibration data until there are so many samples, held in memory for `what`.

    Raises:
        EmptyCalibration: if there is no batch.
    """
    found: list[Any] = []
    count = 0
    for batch in () if batches is None else batches():
        found.append(batch)
        count += next((len(x) for x in tree_leaves(batch) if isinstance(x, Tensor) and x.ndim), 1)
        if count >= samples:
            break
    if not found:
        raise EmptyCalibration(
            f"{what!r} reads inputs, but there is no batch", hint="Pass some hundred inputs."
        )
    return found


def divergence(wanted: Tensor, found: Tensor) -> Tensor:
    """`KL(softmax(wanted) | softmax(found))` of [n, classes]; else the mean squared error over the mean square."""
    if wanted.ndim == 2 and wanted.shape[1] > 1:
        p, q = wanted.double().log_softmax(1), found.double().log_softmax(1)
        return (p.exp() * (p - q)).sum(1).mean()
    return ((wanted - found).double() ** 2).mean() / (wanted.double() ** 2).mean().clamp_min(1e-30)

"""Numbers that all ranks of a process group agree on."""

from __future__ import annotations

from typing import Literal

import torch.distributed as dist
from torch import Tensor


def agreed(value: Tensor, how: Literal["max", "mean"]) -> Tensor:
    """The maximum or the mean over all ranks; the value itself where there is one process. Any shape."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return value
    total = value.clone()
    dist.all_reduce(total, dist.ReduceOp.MAX if how == "max" else dist.ReduceOp.SUM)
    return total if how == "max" else total / dist.get_world_size()

"""Another weight for the inputs that a quantized network sends, so that the layer answers as the float one would."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from pennyweight.errors import SolverError


def retarget(weight: Tensor, gram: Tensor, cross: Tensor, damp: float = 0.01) -> Tensor:
    """`W* = W (G + l I) (H + l I)^-1`, the least squares of `W x~` on x, pulled toward W.

    With `H = E[x x^T]` of the inputs as they come, `G = E[x~ x^T]` with the inputs x~ of the float network, and
    `l = damp * mean(diag H)`.

    Shapes: weight [out, in]; gram, cross [in, in], or [groups, in, in] for rows in that many parts; result [out, in],
    float32.
    Source: the correction of Qronos (Zhang et al. 2025, arXiv:2505.11695) made once, before the rounding.

    Raises:
        SolverError: if H is not positive definite.
    """
    return next(retargeted(weight, gram, cross, (damp,)))


def retargeted(weight: Tensor, gram: Tensor, cross: Tensor, damps: Iterable[float]) -> Iterator[Tensor]:
    """`retarget` by each of some pulls."""
    h, g = (m.double().reshape(-1, *m.shape[-2:]) for m in (gram, cross))
    w = weight.double().reshape(len(h), -1, h.shape[-1])
    aim, mean = w @ g, h.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(1e-30).reshape(-1, 1, 1)
    eye = torch.eye(h.shape[-1], dtype=h.dtype, device=h.device)
    for damp in damps:
        level = damp * mean
        lower, failed = torch.linalg.cholesky_ex(h + level * eye)
        if bool(failed.any()):
            raise SolverError("the second moments are not positive definite", shapes=str(tuple(gram.shape)))
        found: Tensor = torch.cholesky_solve((aim + level * w).mT, lower).mT
        yield found.reshape(weight.shape).float()

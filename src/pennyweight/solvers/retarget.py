"""Another weight for the inputs that a quantized network sends, so that the layer answers as the float one would."""

from __future__ import annotations

import torch
from torch import Tensor

from pennyweight.errors import SolverError


def retarget(weight: Tensor, gram: Tensor, cross: Tensor, damp: float = 0.01) -> Tensor:
    """`W* = W (G + l I) (H + l I)^-1`, the least squares of `W x~` on x, pulled toward W.

    With `H = E[x x^T]` of the inputs as they come, `G = E[x~ x^T]` with the inputs x~ of the float network, and
    `l = damp * mean(diag H)`.

    Shapes: weight [out, in]; gram, cross [in, in]; result [out, in], float32.
    Source: the correction of Qronos (Zhang et al. 2025, arXiv:2505.11695) made once, before the rounding.

    Raises:
        SolverError: if H is not positive definite.
    """
    h, g = gram.double(), cross.double()
    level = damp * h.diagonal().mean().clamp_min(1e-30)
    eye = torch.eye(len(h), dtype=h.dtype) * level
    lower, failed = torch.linalg.cholesky_ex(h + eye)
    if bool(failed):
        raise SolverError("the second moments are not positive definite", shapes=str(tuple(gram.shape)))
    target = weight.double() @ (g + eye)
    found: Tensor = torch.cholesky_solve(target.T, lower).T.float()
    return found

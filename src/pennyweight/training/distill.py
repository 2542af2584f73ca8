"""Learning from the float model."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from pennyweight.errors import InputError


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """`T^2 KL(softmax(teacher / T) || softmax(student / T))`, averaged over all rows.

    Shapes: both [..., classes]; no gradient flows into the teacher. T = 1 is right for few bits: softer targets cost
    accuracy there.

    Raises:
        InputError: on different shapes or a temperature that is not positive.
    Source: Hinton et al. 2015 (arXiv:1503.02531), section 2; for few bits Esser et al. 2020 (arXiv:1902.08153), 3.5.
    """
    if student.shape != teacher.shape:
        raise InputError(
            "student and teacher differ in shape", shapes=f"{tuple(student.shape)}, {tuple(teacher.shape)}"
        )
    if temperature <= 0:
        raise InputError(f"temperature {temperature} is not positive")
    classes = student.shape[-1]
    mine = F.log_softmax(student.reshape(-1, classes).float() / temperature, -1)
    theirs = F.log_softmax(teacher.detach().reshape(-1, classes).float() / temperature, -1)
    return F.kl_div(mine, theirs, reduction="batchmean", log_target=True) * temperature**2

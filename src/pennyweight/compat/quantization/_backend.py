"""The backend whose rules `get_default_qconfig` and its like stand for."""

from __future__ import annotations

from pennyweight.compat.quantization.qconfig import BACKENDS
from pennyweight.errors import InputError, nearest


def set_backend(name: str) -> None:
    """What `torch.backends.quantized.engine = name` was for. Kernels are chosen by instruction set here.

    Raises:
        InputError: on an unknown name.
    """
    if name not in BACKENDS:
        raise InputError(f"backend {name!r} is unknown", hint=nearest(name, BACKENDS, "backends"))

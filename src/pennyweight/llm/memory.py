"""Memory that a process has freed, given back to the system."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any


@cache
def _trim() -> Any:
    """glibc's `malloc_trim`; None elsewhere."""
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):  # not glibc; no handle of the process itself
        return None
    trim.restype, trim.argtypes = ctypes.c_int, [ctypes.c_size_t]
    return trim


def give_back() -> None:
    """Let the system have again what was freed.

    glibc takes what is smaller than 32 MB from its heap, and keeps the holes between what lives: over a block of a
    language model some hundred MB. Elsewhere it does nothing.
    """
    trim = _trim()
    if trim is not None:
        trim(0)

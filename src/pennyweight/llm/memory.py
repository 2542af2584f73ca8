"""Memory that a process has freed, given back to the system."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

TRIM, MAPPED = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD
LARGE = 8 << 20
USUAL = 32 << 20  # where glibc's own threshold ends, once something of this size was freed


@cache
def glibc(name: str) -> Any:
    """A function of glibc's; None elsewhere."""
    try:
        return getattr(ctypes.CDLL(None), name, None)
    except (OSError, TypeError):  # no handle of the process itself
        return None


def give_back() -> None:
    """Let the system have again what was freed.

    glibc keeps the holes between what lives: over a block of a language model some hundred MB. Elsewhere this does
    nothing.
    """
    trim = glibc("malloc_trim")
    if trim is not None:
        trim(ctypes.c_size_t(0))


@contextmanager
def returning() -> Iterator[None]:
    """Let the system have at once what is freed of 8 MB and more.

    glibc takes what is smaller than 32 MB from its heap, a threshold that it has raised by itself by the time a model
    is loaded: its holes grow from block to block. It is put back behind. Elsewhere this does nothing.
    """
    option = glibc("mallopt")
    if option is None:
        yield
        return
    try:
        option(MAPPED, LARGE)
        option(TRIM, 2 * LARGE)
        yield
    finally:
        option(MAPPED, USUAL)
        option(TRIM, 2 * USUAL)

"""Load and run .dwt files with numpy alone: no torch, a start of milliseconds.

session = pennyweight.runtime.load("model.dwt")
logits = session.run(images)
"""

from contextlib import suppress

from pennyweight.errors import KernelError
from pennyweight.runtime import library
from pennyweight.runtime.format import read
from pennyweight.runtime.session import Port, Session, load

with suppress(KernelError, OSError, AttributeError):  # whoever needs it is told what is wrong
    library.load()

__all__ = ["Port", "Session", "load", "read"]

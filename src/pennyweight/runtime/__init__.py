"""Load and run .dwt files with numpy alone: no torch, a start of milliseconds.

session = pennyweight.runtime.load("model.dwt")
logits = session.run(images)
"""

from pennyweight.runtime.format import read
from pennyweight.runtime.session import Port, Session, load

__all__ = ["Port", "Session", "load", "read"]

"""Whole-graph files: each exporter writes a `Program` to a path and returns the size in bytes. One file per format."""

from __future__ import annotations

import os
from typing import Protocol

from pennyweight.program.ir import Program
from pennyweight.registry import Registry


class Exporter(Protocol):
    """Writes one format."""

    def __call__(self, program: Program, path: str | os.PathLike[str], *, compress: bool = False) -> int:
        """Write `program` to `path`, atomically; returns the size in bytes.

        Raises:
            FormatError: if `compress` is asked for and the format has nothing of the kind.
        """
        ...


exporters: Registry[Exporter] = Registry("exporters", "pennyweight.exporters")

"""Arrays from numpy's files, pickled objects refused."""

from __future__ import annotations

from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from pennyweight.errors import InputError
from pennyweight.program.ir import Array


def load_arrays(path: Path) -> dict[str, Array]:
    """The arrays of a `.npy` file (under the name "") or of a `.npz` file.

    Raises:
        InputError: if the file is none, or holds pickled objects.
        OSError: if it is not there.
    """
    if path.suffix not in (".npy", ".npz"):
        raise InputError(
            f"suffix {path.suffix!r} is not numpy's", site=str(path), hint="Give a .npy or .npz file."
        )
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {str(path)!r}")
    try:
        if path.suffix == ".npy":
            return {"": np.load(path, mmap_mode="r", allow_pickle=False)}
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (ValueError, EOFError, KeyError, TypeError, BadZipFile) as error:
        raise InputError(
            f"this is no numpy file: {' '.join(str(error).split())[:200]}", site=str(path)
        ) from error

"""Our own file: program, constants, journal, checksum. `docs/format.md` is the law, `runtime.format` the reader."""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from pennyweight.atomic import atomic_write
from pennyweight.errors import FormatError
from pennyweight.exporters import exporters
from pennyweight.program.bounds import check, check_attributes
from pennyweight.program.ir import Array, Program
from pennyweight.program.text import dumps, to_text
from pennyweight.program.verify import verify
from pennyweight.runtime.container import DEFLATED, DTYPES, digest_of, header_text
from pennyweight.runtime.format import FORMAT, FORMAT_KEY, META_KEY, PROGRAM_KEY, STORED


def write_container(
    path: str | os.PathLike[str],
    tensors: Mapping[str, tuple[str, Array]],
    metadata: Mapping[str, str],
    *,
    compress: bool = False,
) -> int:
    """Write a checked safetensors file, atomically; the same content gives the same bytes. Returns its size in bytes.

    Args:
        path: target.
        tensors: name to (safetensors dtype, array held as `container.DTYPES` says).
        metadata: text by key.
        compress: put all of it into a zlib stream.

    Raises:
        FormatError: if a tensor is not held as it should be, or the header is over the limit.
        OSError: if the file cannot be written.
    """
    arrays: dict[str, tuple[str, Array]] = {}
    for name, (dtype, array) in tensors.items():
        if array.dtype != np.dtype(DTYPES[dtype][0]):
            raise FormatError(f"tensor {name!r} is held as {array.dtype}, not {DTYPES[dtype][0]} for {dtype}")
        arrays[name] = dtype, np.ascontiguousarray(array).reshape(array.shape)
    order = sorted(arrays, key=lambda n: -DTYPES[arrays[n][0]][1])  # wide elements first: all stay aligned
    table = [(n, arrays[n][0], arrays[n][1].shape, arrays[n][1].nbytes) for n in order]
    parts = [arrays[n][1].reshape(-1).view(np.uint8) for n in order if arrays[n][1].nbytes]
    digest = digest_of([header_text(table, metadata), *parts])
    header = header_text(table, metadata, digest)
    pieces: list[Any] = [header, *(p.data for p in parts)]
    size = len(header) + sum(p.nbytes for p in parts)
    if compress:
        stream = zlib.compressobj(9)
        packed = b"".join([*(stream.compress(p) for p in pieces), stream.flush()])
        pieces = [DEFLATED, size.to_bytes(8, "little"), packed]
        size = 16 + len(packed)
    with atomic_write(path) as file:
        for piece in pieces:
            file.write(piece)
    return size


@exporters.register("dwt")
def write_dwt(program: Program, path: str | os.PathLike[str], *, compress: bool = False) -> int:
    """Write a program as a .dwt file; returns its size in bytes.

    The program is checked first as the reader will check it: a file that is written can be read.

    Args:
        program: verified or not; `program.meta` goes into the file and must be plain JSON values.
        path: target.
        compress: put all of it into a zlib stream: about a tenth smaller, to be inflated at every loading.

    Raises:
        VerifyError: if the program breaks its own rules or relies on values out of range.
        FormatError: if the header is over the limit.
        OSError: if the file cannot be written; nothing is left behind then.
    """
    check_attributes(program)
    check(program, verify(program))
    metadata: dict[str, str] = {
        FORMAT_KEY: str(FORMAT),
        PROGRAM_KEY: to_text(program),
        META_KEY: dumps(dict(program.meta)),
    }
    tensors: dict[str, tuple[str, Any]] = {n: (STORED[c.dtype], c.data) for n, c in program.constants.items()}
    return write_container(path, tensors, metadata, compress=compress)

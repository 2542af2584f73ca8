"""Reading .dwt files: the outer layer, then the program, then its types and value ranges. Never imports torch."""

from __future__ import annotations

import os
from typing import Any

from pennyweight.errors import FormatError, PennyweightError, VerifyError
from pennyweight.program.bounds import check, check_attributes
from pennyweight.program.ir import Program, TensorType
from pennyweight.program.text import from_text, loads
from pennyweight.program.verify import verify
from pennyweight.runtime.container import Container, in_file, opened

FORMAT = 2
FORMAT_KEY, PROGRAM_KEY, META_KEY = "pennyweight.format", "pennyweight.program", "pennyweight.meta"

# program dtype -> the safetensors dtype that stores it
STORED = {
    "f32": "F32", "f16": "F16", "bf16": "BF16", "u8": "U8", "i8": "I8", "u4": "U8", "i32": "I32", "i64": "I64",
    "bool": "BOOL", "i16": "I16",
}  # fmt: skip


def read(path: str | os.PathLike[str], *, check_sum: bool = True) -> Program:
    """Read and check a .dwt file. Constants are views of the mapped file, not copies.

    Args:
        path: the file.
        check_sum: compute the checksum of all bytes; off, a large file opens without being read.

    Raises:
        FormatError: on the first broken promise of docs/format.md, naming the file.
        OSError: if the file cannot be opened.
    """
    program = read_typed(path, check_sum=check_sum)[0]
    assert type(program.meta) is dict  # now that it is asked for, it is checked too
    return program


def read_typed(
    path: str | os.PathLike[str], *, check_sum: bool = True
) -> tuple[Program, dict[str, TensorType]]:
    """As `read`; with the types of all values at the sizes of the example. The meta is read when it is asked for."""
    container, checksum = opened(path, check=check_sum)
    try:
        try:
            return _program(container)
        finally:  # whatever is wrong with the program: damage is the reason, where there is damage
            if checksum is not None:
                checksum.verify()
    except PennyweightError as error:
        raise in_file(error, container.path) from error
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RecursionError) as error:
        what = f"the program does not verify: {type(error).__name__}: {str(error)[:200]}"
        raise FormatError(what, site=container.path) from error


def _program(container: Container) -> tuple[Program, dict[str, TensorType]]:
    metadata = container.metadata
    version = metadata.get(FORMAT_KEY)
    if version is None:
        raise FormatError(
            f"metadata {FORMAT_KEY!r} is missing", hint="This is a safetensors file, but no .dwt model."
        )
    if version != str(FORMAT):
        raise FormatError(
            f"format version {version[:40]!r} is unknown",
            hint=f"This is a reader of version {FORMAT}; a newer pennyweight may read it.",
        )
    unknown = [
        k for k in metadata if k.startswith("pennyweight.") and k not in (FORMAT_KEY, PROGRAM_KEY, META_KEY)
    ]
    if unknown:
        raise FormatError(f"metadata key {unknown[0][:40]!r} is unknown")
    if PROGRAM_KEY not in metadata:
        raise FormatError(f"metadata {PROGRAM_KEY!r} is missing")
    program = from_text(metadata[PROGRAM_KEY], {n: a for n, (_, a) in container.tensors.items()})
    for name, constant in program.constants.items():
        stored, array = container.tensors[name]
        if STORED[constant.dtype] != stored:
            raise FormatError(f"constant {name!r} is {constant.dtype}, but stored as {stored}")
        program.places[name] = array, container.places[name]
    program.tell_later(lambda: _meta(metadata.get(META_KEY, "{}"), container.path))
    check_attributes(program)
    types = verify(program)
    check(program, types)
    return program, types


def _meta(text: str, path: str) -> dict[str, Any]:
    try:
        meta = loads(text, "meta")
        if type(meta) is not dict:
            raise VerifyError("the meta is no JSON object")
    except VerifyError as error:
        raise in_file(error, path) from error
    return meta

"""The outer layer of our files: safetensors, read strictly. numpy and the standard library alone.

A file is an 8-byte little-endian length, a JSON header of that length, and the tensors' data: no gap, no overlap,
nothing behind it. One metadata entry is the SHA-256 of all bytes, taken with its own 64 digits set to "0".
docs/format.md says it in words; every promise there is one `FormatError` here.
A deflated file is such a file inside of a zlib stream, behind `DEFLATED` and its length.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import stat
import sys
from _thread import allocate_lock
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np

from pennyweight.errors import FormatError, KernelError, PennyweightError, nearest
from pennyweight.program.ir import Array
from pennyweight.program.text import dumps, loads

HEADER_LIMIT = 1 << 26
ELEMENTS_LIMIT = (1 << 31) - 1
RANK_LIMIT = 8
TENSORS_LIMIT = 200_000
ALIGNMENT = 64  # of the data's beginning in the file
CHECKSUM = "pennyweight.sha256"
DEFLATED = b"DWTzlib\0"  # read as a header's length, it is beyond every limit: older readers refuse it
_SAID = re.compile(rb'"pennyweight\.sha256" ?: ?"([0-9a-f]{64})"')
_DENSEST = 1032  # bytes that one deflated byte can stand for (zlib's technical details)

# safetensors dtype -> numpy dtype that holds it, bytes; BF16 and the 8-bit floats are held as their bits
DTYPES: dict[str, tuple[str, int]] = {
    "F64": ("<f8", 8), "I64": ("<i8", 8), "U64": ("<u8", 8), "F32": ("<f4", 4), "I32": ("<i4", 4), "U32": ("<u4", 4),
    "F16": ("<f2", 2), "BF16": ("<u2", 2), "I16": ("<i2", 2), "U16": ("<u2", 2), "I8": ("|i1", 1), "U8": ("|u1", 1),
    "BOOL": ("|b1", 1), "F8_E4M3": ("|u1", 1), "F8_E5M2": ("|u1", 1),
}  # fmt: skip


class Container(NamedTuple):  # (a dataclass takes half a millisecond to make, when this module is imported)
    """What a file holds.

    Attributes:
        path: for messages.
        tensors: name to (safetensors dtype, read-only array; on the mapped file, or on what it was inflated to).
        metadata: text by key, the checksum excluded.
        size: bytes of the file, inflated.
    """

    path: str
    tensors: dict[str, tuple[str, Array]]
    metadata: dict[str, str]
    size: int


def header_text(
    tensors: Iterable[tuple[str, str, tuple[int, ...], int]],
    metadata: Mapping[str, str],
    digest: str = "0" * 64,
) -> bytes:
    """The length and the JSON header, padded so that the data begin at a multiple of 64.

    Args:
        tensors: name, dtype, shape and bytes, in the order of their data.
        metadata: text by key.
        digest: of the checksum; zeros while it is being computed.

    Raises:
        FormatError: if the header is over the limit.
    """
    table: dict[str, Any] = {"__metadata__": {**metadata, CHECKSUM: digest}}
    offset = 0
    for name, dtype, shape, nbytes in tensors:
        if name in table:
            raise FormatError(f"tensor name {name!r} is reserved or taken")
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    text = dumps(table).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    if len(text) > HEADER_LIMIT:
        raise FormatError(f"the header would be {len(text)} bytes, over the limit of {HEADER_LIMIT}")
    return len(text).to_bytes(8, "little") + text


def read_container(path: str | os.PathLike[str], *, check: bool = True) -> Container:
    """Map a file and check everything about its outer layer.

    Args:
        path: of a regular file.
        check: verify the checksum too (all bytes are read then).

    Raises:
        FormatError: on the first broken promise, naming the file.
        OSError: if the file cannot be opened.
    """
    container, wait = open_container(path, check=check)
    wait()
    return container


def open_container(
    path: str | os.PathLike[str], *, check: bool = True
) -> tuple[Container, Callable[[], None]]:
    """As `read_container`, but the checksum of a large file is still being computed, on a thread of its own.

    Returns:
        The container, and a function that waits for the checksum and raises FormatError if it does not match: nothing
        of the file may be used before it has been called.
    """
    where = os.fspath(path)
    sum_of = None
    try:
        view = _inflated(_mapped(where))
        text, start = _header_text(view)
        said = (
            _SAID.search(text) if check else None
        )  # where the header seems to say it, the sum need not wait for it
        sum_of = _Checksum(view, text, start, said[1].decode()) if said else None
        header = _header(text, start)
        metadata = _metadata(header.pop("__metadata__", None))
        tensors = _tensors(header, view, start)
        digest = metadata.pop(CHECKSUM, "")
        if check and (sum_of is None or sum_of.stored != digest):
            sum_of = _Checksum(view, text, start, digest)
    except PennyweightError as error:
        if sum_of is not None:
            sum_of.abandon()
        raise in_file(error, where) from error

    def wait() -> None:
        if sum_of is not None:
            try:
                sum_of.compare()
            except PennyweightError as error:
                raise in_file(error, where) from error

    return Container(where, tensors, metadata, len(view)), wait


def in_file(error: PennyweightError, where: str) -> FormatError:
    """The same fact as a FormatError that names the file."""
    site = where if not error.site or error.site == where else f"{where}, {error.site}"
    return FormatError(error.what, site=site, spec=error.spec, shapes=error.shapes, hint=error.hint)


def _mapped(path: str) -> memoryview:
    status = os.stat(path)  # noqa: PTH116 (pathlib would cost a millisecond of the start)
    if not stat.S_ISREG(status.st_mode):
        raise FormatError("this is no regular file")
    if status.st_size < 10:
        raise FormatError(f"the file ends after {status.st_size} bytes, before its header")
    with open(path, "rb") as file:  # noqa: PTH123
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def _inflated(view: memoryview) -> memoryview:
    """What a deflated file holds; any other file as it is."""
    if view[:8] != DEFLATED:
        return view
    size, packed = int.from_bytes(view[8:16], "little"), view[16:]
    if not 10 <= size <= _DENSEST * len(packed):
        raise FormatError(f"{len(packed)} deflated bytes claim to hold {size}")
    import zlib

    stream = zlib.decompressobj()
    try:
        content = stream.decompress(packed, size)
        rest = b"" if stream.eof else stream.decompress(stream.unconsumed_tail, 1)
    except zlib.error as error:
        raise FormatError(f"the deflated bytes are damaged: {error}") from None
    if len(content) != size or rest or not stream.eof or stream.unused_data:
        raise FormatError(f"the deflated bytes do not hold the {size} that they claim, and nothing else")
    return memoryview(content)


def _header_text(view: memoryview) -> tuple[bytes, int]:
    length = int.from_bytes(view[:8], "little")
    if length > HEADER_LIMIT:
        raise FormatError(f"the header claims {length} bytes, over the limit of {HEADER_LIMIT}")
    if 8 + length > len(view):
        raise FormatError(f"the header claims {length} bytes, but the file ends after {len(view)}")
    text = bytes(view[8 : 8 + length])
    if text[:1] != b"{":
        raise FormatError("the header does not begin with '{'", hint="This is no .dwt or safetensors file.")
    return text, 8 + length


def _header(text: bytes, start: int) -> dict[str, Any]:
    try:
        header = loads(text.decode(), "header")
    except UnicodeDecodeError:
        raise FormatError("the header is not UTF-8") from None
    if type(header) is not dict:
        raise FormatError("the header is no JSON object")
    if len(header) > TENSORS_LIMIT:
        raise FormatError(f"the header lists {len(header)} tensors, over the limit of {TENSORS_LIMIT}")
    if start % 8:
        raise FormatError("the data do not begin at a multiple of 8 bytes")
    return header


def _metadata(value: Any) -> dict[str, str]:
    if value is None:
        raise FormatError("there is no __metadata__", hint="This is a safetensors file of another program.")
    if type(value) is not dict or not all(type(v) is str for v in value.values()):
        raise FormatError("__metadata__ is no object of texts")
    return value


def _tensors(header: dict[str, Any], view: memoryview, start: int) -> dict[str, tuple[str, Array]]:
    """Check the table entry by entry, in the order of the data, and view the data in place."""
    entries = sorted((_entry(name, value) for name, value in header.items()), key=lambda e: e[3:5])
    end = 0
    tensors: dict[str, tuple[str, Array]] = {}
    size = len(view) - start
    for name, dtype, shape, begin, stop in entries:
        if begin != end:
            what = "overlaps the one before it" if begin < end else f"leaves a hole of {begin - end} bytes"
            raise FormatError(f"tensor {name!r} {what}")
        if stop > size:
            raise FormatError(f"tensor {name!r} ends at {stop}, but the data end at {size}")
        kind, width = DTYPES[dtype]
        if (start + begin) % width:
            raise FormatError(f"tensor {name!r} begins at {begin}, which is not aligned to {width} bytes")
        count = (stop - begin) // width
        tensors[name] = dtype, np.frombuffer(view, kind, count, start + begin).reshape(shape)
        end = stop
    if end != size:
        raise FormatError(f"{size - end} bytes behind the last tensor belong to nothing")
    return tensors


def _entry(name: str, value: Any) -> tuple[str, str, tuple[int, ...], int, int]:
    if not name or not name.isprintable():
        raise FormatError(f"tensor name {name[:40]!r} is no name")
    if type(value) is not dict or set(value) != {"dtype", "shape", "data_offsets"}:
        raise FormatError(f"the entry of tensor {name!r} is not {{dtype, shape, data_offsets}}")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if type(dtype) is not str or dtype not in DTYPES:
        raise FormatError(
            f"dtype {str(dtype)[:40]!r} of tensor {name!r} is unknown",
            hint=nearest(str(dtype)[:40], DTYPES, "dtypes"),
        )
    elements = 1
    if type(shape) is not list or len(shape) > RANK_LIMIT:
        raise FormatError(f"the shape of tensor {name!r} is no list of at most {RANK_LIMIT} sizes")
    for n in shape:
        if type(n) is not int or not 0 <= n <= ELEMENTS_LIMIT:
            raise FormatError(f"tensor {name!r} has a size {str(n)[:40]}")
        elements *= n
    if elements > ELEMENTS_LIMIT:
        raise FormatError(f"tensor {name!r} has over {ELEMENTS_LIMIT} elements", shapes=str(shape))
    if type(offsets) is not list or len(offsets) != 2 or not all(type(v) is int and v >= 0 for v in offsets):
        raise FormatError(f"the offsets of tensor {name!r} are not two whole numbers")
    wanted = elements * DTYPES[dtype][1]
    if offsets[1] - offsets[0] != wanted:
        raise FormatError(
            f"tensor {name!r} takes {wanted} bytes, but its offsets span {str(offsets[1] - offsets[0])[:40]}"
        )
    return name, dtype, tuple(shape), offsets[0], offsets[1]


class _Checksum:
    """The digest stands in the header once; with zeros in its place, all bytes of the file must give it."""

    def __init__(self, view: memoryview, text: bytes, start: int, digest: str) -> None:
        stored = digest.encode()
        if len(digest) != 64 or text.count(stored) != 1 or any(c not in "0123456789abcdef" for c in digest):
            raise FormatError(f"metadata {CHECKSUM!r} is no checksum")
        self.stored = digest
        self._digest: _Digest | None = _Digest([view[:8], text.replace(stored, b"0" * 64), view[start:]])
        self._found = ""
        self._one = allocate_lock()

    def abandon(self) -> None:
        """Nobody reads the file any more when this returns, and its owner may do what they like with it."""
        with self._one:
            if self._digest is not None:
                self._digest.abandon()

    def compare(self) -> None:
        with self._one:
            if self._digest is not None:
                self._found, self._digest = self._digest.end(), None
            found = self._found
        if found != self.stored:
            raise FormatError(
                "the checksum does not match: the file was altered or damaged",
                spec=f"sha256 {found[:16]}..., stored {self.stored[:16]}...",
                hint="Write the file again.",
            )


def digest_of(parts: Sequence[Any]) -> str:
    """SHA-256 of consecutive buffers, as 64 hexadecimal digits."""
    return _Digest(parts).end()


class _Digest:
    """SHA-256 of consecutive buffers, being computed.

    By libpennyweight on a thread that needs no interpreter, where it is at hand and the processor has instructions for
    it; else by Python, at the end.
    """

    def __init__(self, parts: Sequence[Any]) -> None:
        self._parts = parts
        self._native, self._begun = _begin_native(parts)

    def end(self) -> str:
        """Wait for it, once: 64 hexadecimal digits."""
        if self._begun:
            out = bytearray(32)
            begun, self._begun = self._begun, None
            self._native.pw_sha256_end(begun, (ctypes.c_char * 32).from_buffer(out))
            return out.hex()
        digest = _hasher(sum(len(part) for part in self._parts))
        for part in self._parts:
            digest.update(part)
        return str(digest.hexdigest())

    def abandon(self) -> None:
        """Give up; the buffers are not read when this returns."""
        begun, self._begun = self._begun, None
        if begun:
            self._native.pw_sha256_end(begun, None)

    __del__ = abandon


def _begin_native(parts: Sequence[Any]) -> tuple[Any, Any]:
    from pennyweight.runtime import library

    try:
        native = library.load()
    except (KernelError, OSError):
        return None, None
    held = [np.frombuffer(part, np.uint8) for part in parts]
    places = (ctypes.c_void_p * len(held))(*[a.ctypes.data for a in held])
    sizes = (ctypes.c_int64 * len(held))(*[a.size for a in held])
    return native, native.pw_sha256_begin(len(held), places, sizes)


def _hasher(size: int) -> Any:
    """A SHA-256. Loading OpenSSL takes 3 ms, in which Python's own module has hashed a megabyte."""
    name = "hashlib"
    if size < 1 << 20:
        name = "_sha2" if sys.version_info >= (3, 12) else "_sha256"
    try:
        module: Any = import_module(name)
    except ImportError:  # this Python was built without its own
        module = import_module("hashlib")
    return module.sha256()

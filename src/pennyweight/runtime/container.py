"""The outer layer of our files: safetensors, read strictly. numpy and the standard library alone.

A file is an 8-byte little-endian length, a JSON header of that length, and the tensors' data: no gap, no overlap,
nothing behind it. One metadata entry is the CRC-32 of all bytes, taken with its own 8 digits set to "0".
docs/format.md says it in words; every promise there is one `FormatError` here.
A deflated file is such a file inside of a zlib stream, behind `DEFLATED` and its length.
"""

from __future__ import annotations

import mmap
import os
import re
import stat
from collections.abc import Iterable, Mapping, Sequence
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
CHECKSUM = "pennyweight.crc32"
DEFLATED = b"DWTzlib\0"  # read as a header's length, it is beyond every limit: older readers refuse it
ZEROS = "0" * 8
_SAID = re.compile(rb'("pennyweight\.crc32" ?: ?")([0-9a-f]{8})"')
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
    digest: str = ZEROS,
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
    where = os.fspath(path)
    try:
        view = _inflated(_mapped(where))
        text, start = _header_text(view)
        header = _header(text, start)
        metadata = _metadata(header.pop("__metadata__", None))
        metadata.pop(CHECKSUM, None)
        tensors = _tensors(header, view, start)
        if check:
            _compare(view, text, start)
        return Container(where, tensors, metadata, len(view))
    except PennyweightError as error:
        raise in_file(error, where) from error


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
        header = loads(text.decode(), "header", measured=False)
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


def _compare(view: memoryview, text: bytes, start: int) -> None:
    """The digits stand in the header once; with zeros in their place, all bytes of the file must give them."""
    found = _SAID.findall(text)
    if len(found) != 1:
        raise FormatError(
            f"the header has no checksum {CHECKSUM!r}",
            hint="Other programs' safetensors files have none. A .dwt file of format 1 must be written anew.",
        )
    ((key, stored),) = found
    digest = digest_of([view[:8], text.replace(key + stored, key + ZEROS.encode()), view[start:]])
    if digest != stored.decode():
        raise FormatError(
            "the checksum does not match: the file was altered or damaged",
            spec=f"crc32 {digest}, stored {stored.decode()}",
            hint="Write the file again.",
        )


def digest_of(parts: Sequence[Any]) -> str:
    """CRC-32 (IEEE 802.3) of consecutive buffers, as 8 hexadecimal digits: of libpennyweight, or else of zlib."""
    from pennyweight.runtime import library

    digest = 0
    try:
        crc32 = library.load().pw_crc32
    except (KernelError, OSError, AttributeError):  # AttributeError: a library of another version
        import zlib

        for part in parts:
            digest = zlib.crc32(part, digest)
    else:
        for part in parts:
            bytes_ = np.frombuffer(part, np.uint8)
            digest = crc32(digest, bytes_.__array_interface__["data"][0], bytes_.size)
    return f"{digest:08x}"

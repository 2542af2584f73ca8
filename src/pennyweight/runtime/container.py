"""The outer layer of our files: safetensors, read strictly. numpy and the standard library alone.

A file is an 8-byte little-endian length, a JSON header of that length, and the tensors' data: no gap, no overlap,
nothing behind it. One metadata entry is the CRC-32 of all bytes, taken with its own 8 digits set to "0".
docs/format.md says it in words; every promise there is one `FormatError` here.
A deflated file is such a file inside of a zlib stream, behind `DEFLATED` and its length.
"""

from __future__ import annotations

import mmap
import operator
import os
import re
import stat
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
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
_SAID_BY = b'"pennyweight.crc32"'
_SAID = re.compile(_SAID_BY + rb' ?: ?"([0-9a-f]{8})"')
_ASIDE = 1 << 20  # bytes from which on a thread for their checksum pays
_DENSEST = 1032  # bytes that one deflated byte can stand for (zlib's technical details)

# safetensors dtype -> numpy dtype that holds it, bytes; BF16 and the 8-bit floats are held as their bits
_HELD: dict[str, tuple[str, int]] = {
    "F64": ("<f8", 8), "I64": ("<i8", 8), "U64": ("<u8", 8), "F32": ("<f4", 4), "I32": ("<i4", 4), "U32": ("<u4", 4),
    "F16": ("<f2", 2), "BF16": ("<u2", 2), "I16": ("<i2", 2), "U16": ("<u2", 2), "I8": ("|i1", 1), "U8": ("|u1", 1),
    "BOOL": ("|b1", 1), "F8_E4M3": ("|u1", 1), "F8_E5M2": ("|u1", 1),
}  # fmt: skip
_OFFSETS = operator.itemgetter(3, 4)  # of an entry
_FIELDS = {"dtype", "shape", "data_offsets"}
DTYPES = {name: (np.dtype(held), width) for name, (held, width) in _HELD.items()}


class Container(NamedTuple):  # (a dataclass takes half a millisecond to make, when this module is imported)
    """What a file holds.

    Attributes:
        path: for messages.
        tensors: name to (safetensors dtype, read-only array; on the mapped file, or on what it was inflated to).
        metadata: text by key, the checksum excluded.
        size: bytes of the file, inflated.
        places: where each tensor lies in memory (an array is slow to say it).
    """

    path: str
    tensors: dict[str, tuple[str, Array]]
    metadata: dict[str, str]
    size: int
    places: dict[str, int]


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
    container, checksum = opened(path, check=check)
    if checksum is not None:
        checksum.verify()
    return container


def opened(path: str | os.PathLike[str], *, check: bool = True) -> tuple[Container, Checksum | None]:
    """As `read_container`, but the checksum is still being taken: the caller goes on meanwhile, then verifies it."""
    where = os.fspath(path)
    try:
        view = _inflated(_mapped(where))
        text, start = _header_text(view)
        checksum = Checksum(where, view, text, start) if check else None
        header = _header(text, start)
        metadata = _metadata(header.pop("__metadata__", None))
        metadata.pop(CHECKSUM, None)
        tensors, places = _tensors(header, view, start)
        return Container(where, tensors, metadata, len(view), places), checksum
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


def _tensors(
    header: dict[str, Any], view: memoryview, start: int
) -> tuple[dict[str, tuple[str, Array]], dict[str, int]]:
    """Check the table entry by entry, in the order of the data, and view the data in place. Also the places."""
    entries = [_entry(name, value) for name, value in header.items()]
    entries.sort(key=_OFFSETS)
    end = 0
    tensors: dict[str, tuple[str, Array]] = {}
    places: dict[str, int] = {}
    size, base = len(view) - start, _extent(view)[0] + start
    for name, dtype, shape, begin, stop in entries:
        if begin != end:
            what = "overlaps the one before it" if begin < end else f"leaves a hole of {begin - end} bytes"
            raise FormatError(f"tensor {name!r} {what}")
        if stop > size:
            raise FormatError(f"tensor {name!r} ends at {stop}, but the data end at {size}")
        kind, width = DTYPES[dtype]
        if (start + begin) % width:
            raise FormatError(f"tensor {name!r} begins at {begin}, which is not aligned to {width} bytes")
        tensors[name] = dtype, np.ndarray(shape, kind, view, start + begin)
        places[name] = base + begin
        end = stop
    if end != size:
        raise FormatError(f"{size - end} bytes behind the last tensor belong to nothing")
    return tensors, places


def _entry(name: str, value: Any) -> tuple[str, str, tuple[int, ...], int, int]:
    if not name or not name.isprintable():
        raise FormatError(f"tensor name {name[:40]!r} is no name")
    if type(value) is not dict or value.keys() != _FIELDS:
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
    if type(offsets) is not list or len(offsets) != 2:
        raise FormatError(f"the offsets of tensor {name!r} are not two whole numbers")
    begin, end = offsets
    if type(begin) is not int or type(end) is not int or begin < 0 or end < 0:
        raise FormatError(f"the offsets of tensor {name!r} are not two whole numbers")
    wanted = elements * DTYPES[dtype][1]
    if end - begin != wanted:
        raise FormatError(
            f"tensor {name!r} takes {wanted} bytes, but its offsets span {str(end - begin)[:40]}"
        )
    return name, dtype, tuple(shape), begin, end


class Checksum:
    """The checksum of a file's bytes, taken by another thread while this one looks at what they mean.

    Its digits stand in the header once; with zeros in their place, all bytes of the file must give them.
    """

    def __init__(self, path: str, view: memoryview, text: bytes, start: int) -> None:
        self._path, self._view = path, view  # the thread reads it
        self._stored = _stored(text)
        zeroed = text
        if self._stored is not None:
            place, digits = self._stored
            zeroed = text[:place] + ZEROS.encode() + text[place + len(digits) :]
        self._digest = Digest()
        self._digest.add(view[:8])
        self._digest.add(zeroed)
        self._digest.add_aside(view[start:])

    def verify(self) -> None:
        """Wait for the thread.

        Raises:
            FormatError: if the file is not what its checksum says.
        """
        digest = self._digest.text()
        if self._stored is None:
            raise FormatError(
                f"the header has no checksum {CHECKSUM!r}",
                site=self._path,
                hint="Other programs' safetensors files have none. A .dwt file of format 1 must be written anew.",
            )
        stored = self._stored[1]
        if digest != stored:
            raise FormatError(
                "the checksum does not match: the file was altered or damaged",
                site=self._path,
                spec=f"crc32 {digest}, stored {stored}",
                hint="Write the file again.",
            )


def _stored(text: bytes) -> tuple[int, str] | None:
    """Where the checksum's digits stand in the header, and what they are; None unless they stand there once."""
    place = text.find(_SAID_BY)
    found = _SAID.match(text, place) if place >= 0 and text.find(_SAID_BY, place + 1) < 0 else None
    return None if found is None else (found.start(1), found[1].decode())


class Digest:
    """CRC-32 (IEEE 802.3) of consecutive buffers: by libpennyweight, or else by zlib."""

    def __init__(self) -> None:
        from pennyweight.runtime import library

        self._crc = 0
        self._job: int | None = None
        self._library: Any = None
        with suppress(KernelError, OSError, AttributeError):  # AttributeError: a library of another version
            self._library = library.load()

    def add(self, part: Any) -> None:
        """One buffer more."""
        if self._library is None:
            import zlib

            self._crc = zlib.crc32(part, self._crc)
        else:
            self._crc = self._library.pw_crc32(self._crc, *_extent(part))

    def add_aside(self, part: Any) -> None:
        """The last buffer, where it is large by a thread of its own: it must not go before `text` is called."""
        if self._library is None or len(part) < _ASIDE:
            self.add(part)
        else:
            self._job = self._library.pw_crc32_begin(self._crc, *_extent(part))

    def text(self) -> str:
        """Its 8 hexadecimal digits."""
        self._wait()
        return f"{self._crc:08x}"

    def _wait(self) -> None:
        job, self._job = self._job, None
        if job is not None:
            self._crc = self._library.pw_crc32_end(job)

    def __del__(self) -> None:
        self._wait()  # nobody may take the memory from under the thread


def _extent(part: Any) -> tuple[int, int]:
    """Address and bytes."""
    bytes_ = np.frombuffer(part, np.uint8)
    return bytes_.__array_interface__["data"][0], bytes_.size


def digest_of(parts: Sequence[Any]) -> str:
    """The digest of consecutive buffers, as 8 hexadecimal digits."""
    digest = Digest()
    for part in parts:
        digest.add(part)
    return digest.text()

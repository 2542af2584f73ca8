"""Crafting of .dwt files that lie: take a good one apart, change it, sign it again."""

import json
import re
import zlib

import pytest

from pennyweight.exporters.dwt import write_dwt

ZEROS = "0" * 8


class Craft:
    """A .dwt file in parts."""

    def __init__(self, raw: bytes) -> None:
        length = int.from_bytes(raw[:8], "little")
        self.header = json.loads(raw[8 : 8 + length])
        self.data = bytearray(raw[8 + length :])
        self.program = json.loads(self.header["__metadata__"]["pennyweight.program"])

    @property
    def metadata(self) -> dict:
        return self.header["__metadata__"]

    def op(self, kind: str) -> list:
        """The first op of a kind: [kind, inputs, outputs, attributes, site]."""
        return next(op for op in self.program["ops"] if op[0] == kind)

    def bytes(
        self, *, text: str | None = None, header: str | None = None, sign: bool = True, pad: int = 64
    ) -> bytes:
        """The file again, with a right checksum if `sign`.

        text: of the program, in place of `self.program`. header: the whole header text; "DIGEST" becomes the checksum.
        """
        if "pennyweight.program" in self.metadata:
            self.metadata["pennyweight.program"] = json.dumps(self.program) if text is None else text
        if sign:
            self.metadata["pennyweight.crc32"] = ZEROS
        body = json.dumps(self.header) if header is None else header.replace("DIGEST", ZEROS)
        packed = body.encode("utf8", "surrogatepass")
        packed += b" " * (-(8 + len(packed)) % pad)
        start = len(packed).to_bytes(8, "little")
        if sign:
            digest = f"{zlib.crc32(start + packed + self.data):08x}".encode()
            packed = re.sub(rb'(crc32" ?: ?")0{8}"', rb"\g<1>" + digest + b'"', packed, count=1)
        return start + packed + bytes(self.data)


@pytest.fixture(scope="session")
def good(zoo, tmp_path_factory) -> bytes:
    """The bytes of a good file."""
    path = tmp_path_factory.mktemp("good") / "good.dwt"
    write_dwt(zoo, path)
    return path.read_bytes()


@pytest.fixture
def craft(good) -> Craft:
    """The good file, taken apart."""
    return Craft(good)


@pytest.fixture
def crafted(good):
    """A function that takes the good file apart anew."""
    return lambda: Craft(good)

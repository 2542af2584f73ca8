"""Files whose length, header, tensor table or checksum break a promise: one FormatError each, naming the file."""

import json
import zlib
from itertools import pairwise

import numpy as np
import pytest

from pennyweight.errors import FormatError
from pennyweight.exporters.dwt import write_dwt
from pennyweight.runtime import load, read
from pennyweight.runtime.container import DEFLATED, HEADER_LIMIT


def refuses(path, raw: bytes, what: str) -> None:
    path.write_bytes(raw)
    with pytest.raises(FormatError, match=what) as caught:
        load(path)
    assert str(path) in str(caught.value)


def first(craft) -> dict:
    return next(v for k, v in craft.header.items() if k != "__metadata__")


def test_every_truncation(good, tmp_path):
    length = int.from_bytes(good[:8], "little")
    header = json.loads(good[8 : 8 + length])
    ends = {v["data_offsets"][1] for k, v in header.items() if k != "__metadata__"}
    cuts = {0, 1, 7, 8, 9, 10, 11, 8 + length - 1, 8 + length, len(good) - 1}
    cuts |= {8 + length + e + d for e in ends for d in (-1, 0, 1)}
    cuts |= {good.index(word) for word in (b"__metadata__", b"pennyweight.program", b"data_offsets")}
    for cut in sorted(c for c in cuts if c < len(good)):
        path = tmp_path / "cut.dwt"
        path.write_bytes(good[:cut])
        with pytest.raises(FormatError):
            read(path)


def test_one_byte_more(good, tmp_path):
    refuses(tmp_path / "a.dwt", good + b"\0", "1 bytes behind the last tensor belong to nothing")


def test_two_files_in_one(good, tmp_path):
    refuses(tmp_path / "a.dwt", good + good, "belong to nothing")


@pytest.mark.parametrize("length", [HEADER_LIMIT + 1, 2**40, 2**63, 2**64 - 1])
def test_oversized_header(good, tmp_path, length):
    refuses(tmp_path / "a.dwt", length.to_bytes(8, "little") + good[8:], "header claims")


def test_header_longer_than_the_file(good, tmp_path):
    refuses(tmp_path / "a.dwt", len(good).to_bytes(8, "little") + good[8:], "file ends after")


def test_other_kinds_of_files(tmp_path):
    refuses(tmp_path / "a.dwt", b"PK\x03\x04" + b"\0" * 200, "header")
    refuses(tmp_path / "b.dwt", (50).to_bytes(8, "little") + b"[" + b" " * 60, "does not begin with '{'")
    refuses(
        tmp_path / "c.dwt",
        (2).to_bytes(8, "little") + b"{}" + b"\0" * 6,
        "not begin at a multiple|__metadata__",
    )
    refuses(tmp_path / "d.dwt", b"", "ends after 0 bytes")


def test_a_folder_and_a_missing_file(tmp_path):
    with pytest.raises(FormatError, match="no regular file"):
        read(tmp_path)
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "nothing.dwt")


def test_header_that_is_no_text(craft, tmp_path):
    raw = bytearray(craft.bytes())
    raw[20] = 0xFF
    refuses(tmp_path / "a.dwt", bytes(raw), "not UTF-8")


@pytest.mark.parametrize(
    ("header", "what"),
    [
        ('{"a": 1', "header is not JSON"),
        ('{"a": NaN}', "NaN is not JSON"),
        ('{"a": Infinity}', "Infinity is not JSON"),
        ('{"a": 1, "a": 2}', "twice"),
        ('{"__metadata__": {"x": "1", "x": "2"}}', "twice"),
        ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
        ('{"a": ' + '{"b":' * 5_000 + "1" + "}" * 5_001, "nested too deeply"),
        ('{"a": ' + "[" * 100 + "]" * 100 + "}", "no __metadata__"),
        ('{"a": ' + "9" * 10_000 + "}", "header is not JSON"),
        ('{"__metadata__": []}', "no object of texts"),
        ('{"__metadata__": {"x": 1}}', "no object of texts"),
        ("{}", "no __metadata__"),
        ('{"__metadata__": {}, "t": 5}', "entry of tensor 't'"),
        ('{"__metadata__": {}, "t": {"dtype": "F32", "shape": [0]}}', "entry of tensor 't'"),
        ('{"__metadata__": {}, "t\\u0000": {}}', "is no name"),
        ('{"__metadata__": {}, "\\ud800": {}}', "is no name"),
        ('{"__metadata__": {}, "": {}}', "is no name"),
    ],
)
def test_headers(craft, tmp_path, header, what):
    craft.data = bytearray()
    refuses(tmp_path / "a.dwt", craft.bytes(header=header, sign=False), what)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"dtype": "F33"}, "dtype 'F33'.*Did you mean 'F32'"),
        ({"dtype": 4}, "dtype '4'"),
        ({"dtype": "F8_E4M3FNUZ"}, "dtype"),
        ({"shape": [-1]}, "has a size -1"),
        ({"shape": [True]}, "has a size True"),
        ({"shape": [1.0]}, "has a size 1.0"),
        ({"shape": ["2"]}, "has a size 2"),
        ({"shape": [2**31]}, "has a size 2147483648"),
        ({"shape": [2**62]}, "has a size"),
        ({"shape": [10**300]}, "has a size 1000"),
        ({"shape": [2**30, 2**30]}, "has over 2147483647 elements"),
        ({"shape": [1] * 9}, "no list of at most 8 sizes"),
        ({"shape": "3"}, "no list of at most 8 sizes"),
        ({"shape": [3]}, "takes 12 bytes, but its offsets span"),
        ({"data_offsets": [0]}, "not two whole numbers"),
        ({"data_offsets": [-4, 0]}, "not two whole numbers"),
        ({"data_offsets": [0.0, 8.0]}, "not two whole numbers"),
        ({"data_offsets": [8, 0]}, "offsets span -8"),
        ({"data_offsets": [2**70, 2**70 + 4]}, "offsets span 4"),
        ({"extra": 1}, "is not {dtype, shape, data_offsets}"),
    ],
)
def test_tensor_entries(craft, tmp_path, change, what):
    entry = next(v for k, v in craft.header.items() if k != "__metadata__" and v["dtype"] == "F32")
    entry.update(change)
    refuses(tmp_path / "a.dwt", craft.bytes(), what)


def test_overlap(craft, tmp_path):
    entries = sorted(
        (v for k, v in craft.header.items() if k != "__metadata__"), key=lambda v: v["data_offsets"]
    )
    a, b = next((x, y) for x, y in pairwise(entries) if x["dtype"] == y["dtype"] == "F32")
    b["data_offsets"] = [n - 4 for n in b["data_offsets"]]
    assert a["data_offsets"][1] > b["data_offsets"][0]
    refuses(tmp_path / "a.dwt", craft.bytes(), "overlaps the one before it")


def test_same_bytes_twice(craft, tmp_path):
    entry = first(craft)
    craft.header["again"] = dict(entry)
    refuses(tmp_path / "a.dwt", craft.bytes(), "overlaps the one before it")


def test_hole_that_hides_something(craft, tmp_path):
    entries = [v for k, v in craft.header.items() if k != "__metadata__"]
    for entry in entries:
        entry["data_offsets"] = [n + 8 for n in entry["data_offsets"]]
    craft.data = bytearray(b"evil code") + craft.data
    refuses(tmp_path / "a.dwt", craft.bytes(), "leaves a hole of 8 bytes")


def test_hole_in_the_middle(craft, tmp_path):
    entries = sorted(
        (v for k, v in craft.header.items() if k != "__metadata__"), key=lambda v: v["data_offsets"]
    )
    gap = entries[3]["data_offsets"][0]
    for entry in entries[3:]:
        entry["data_offsets"] = [n + 64 for n in entry["data_offsets"]]
    craft.data[gap:gap] = b"\0" * 64
    refuses(tmp_path / "a.dwt", craft.bytes(), "leaves a hole of 64 bytes")


def test_misaligned_tensor(craft, tmp_path):
    for entry in (v for k, v in craft.header.items() if k != "__metadata__"):
        entry["data_offsets"] = [n + 1 for n in entry["data_offsets"]]
    craft.header["byte"] = {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}
    craft.data = bytearray(b"\0") + craft.data
    refuses(tmp_path / "a.dwt", craft.bytes(), "not aligned to")


def test_misaligned_data(craft, tmp_path):
    refused = 0
    for n in range(8):  # one of eight happens to fit
        craft.metadata["filler"] = " " * n
        raw = craft.bytes(pad=1)
        if int.from_bytes(raw[:8], "little") % 8:
            refuses(tmp_path / "a.dwt", raw, "not begin at a multiple of 8")
            refused += 1
    assert refused == 7


def test_one_flipped_bit_anywhere(good, tmp_path):
    length = int.from_bytes(good[:8], "little")
    path = tmp_path / "bit.dwt"
    for place in [*range(0, len(good), 61), 8 + length, len(good) - 1]:
        raw = bytearray(good)
        raw[place] ^= 4
        path.write_bytes(raw)
        with pytest.raises(FormatError):
            read(path)


def test_flipped_data_is_a_checksum_error(good, tmp_path):
    raw = bytearray(good)
    raw[-1] ^= 1
    refuses(tmp_path / "a.dwt", bytes(raw), "checksum does not match")


@pytest.mark.parametrize("digest", ["", "0" * 7, "g" * 8, "A" * 8, "0" * 8, "0" * 9, "0" * 64])
def test_wrong_checksums(craft, tmp_path, digest):
    craft.metadata["pennyweight.crc32"] = digest
    refuses(tmp_path / "a.dwt", craft.bytes(sign=False), "checksum")


def test_missing_checksum(craft, tmp_path):
    del craft.metadata["pennyweight.crc32"]
    refuses(tmp_path / "a.dwt", craft.bytes(sign=False), "no checksum")


def test_checksum_that_is_there_twice(craft, tmp_path):
    header = json.dumps(craft.header)
    for double in ('"pennyweight.crc32": "00000000", ', '"pennyweight.crc32": "12345678", '):
        twice = header.replace('"pennyweight.crc32"', double + '"pennyweight.crc32"')
        assert twice != header
        refuses(tmp_path / "a.dwt", craft.bytes(header=twice), "twice")


def test_a_file_of_the_first_format(craft, tmp_path):
    del craft.metadata["pennyweight.crc32"]
    craft.metadata["pennyweight.sha256"] = "0" * 64
    refuses(tmp_path / "a.dwt", craft.bytes(sign=False), "format 1 must be written anew")


def test_unchecked_reading_still_checks_the_table(craft, tmp_path):
    path = tmp_path / "a.dwt"
    craft.data[-1] ^= 1
    path.write_bytes(craft.bytes(sign=False))
    assert read(path, check_sum=False).ops
    first(craft)["shape"] = [-1]
    path.write_bytes(craft.bytes(sign=False))
    with pytest.raises(FormatError, match="size -1"):
        read(path, check_sum=False)


def deflated(raw: bytes, claim: int | None = None) -> bytes:
    return DEFLATED + (len(raw) if claim is None else claim).to_bytes(8, "little") + zlib.compress(raw, 9)


def test_deflated_files_read_as_what_is_inside(good, zoo, tmp_path):
    path = tmp_path / "a.dwt"
    size = write_dwt(zoo, path, compress=True)
    raw = path.read_bytes()
    assert len(raw) == size < len(good)
    assert raw == deflated(good)
    (tmp_path / "plain.dwt").write_bytes(good)
    one, other = read(path), read(tmp_path / "plain.dwt")
    assert one.ops == other.ops
    assert all(np.array_equal(c.data, other.constants[n].data) for n, c in one.constants.items())


def test_every_truncation_of_a_deflated_file(good, tmp_path):
    raw = deflated(good)
    for cut in {*range(40), *range(40, len(raw), 97), len(raw) - 1}:
        refuses(tmp_path / "cut.dwt", raw[:cut], "deflated|file ends after")


@pytest.mark.parametrize("change", [-1, 1, 4096])
def test_deflated_files_that_lie_about_their_size(good, tmp_path, change):
    refuses(tmp_path / "a.dwt", deflated(good, len(good) + change), "do not hold")


@pytest.mark.parametrize("claim", [0, 9, 2**40, 2**64 - 1])
def test_sizes_that_cannot_be(good, tmp_path, claim):
    refuses(tmp_path / "a.dwt", deflated(good, claim), "claim to hold")


def test_a_bomb_is_not_set_off(tmp_path):
    refuses(tmp_path / "a.dwt", deflated(bytes(1 << 28), 5000), "do not hold the 5000")


def test_deflated_damage(good, tmp_path):
    raw = deflated(good)
    for place in range(16, len(raw), max(1, len(raw) // 150)):
        for bit in (1, 128):
            refuses(
                tmp_path / "a.dwt",
                raw[:place] + bytes([raw[place] ^ bit]) + raw[place + 1 :],
                "deflated|claim|checksum",
            )


def test_nothing_behind_a_deflated_file(good, tmp_path):
    refuses(tmp_path / "a.dwt", deflated(good) + b"x", "nothing else")


def test_no_file_in_a_file_in_a_file(good, tmp_path):
    refuses(tmp_path / "a.dwt", deflated(deflated(good)), "header claims")

"""The checksum: that of the standard, from whichever code computes it, and damage is told."""

import itertools
import threading
import zlib

import numpy as np
import pytest

from pennyweight.errors import FormatError, KernelError
from pennyweight.exporters.dwt import write_dwt
from pennyweight.program import ir
from pennyweight.runtime import container, library
from pennyweight.runtime.format import read

DATA = np.random.default_rng(0).integers(0, 256, 1 << 20, dtype=np.uint8).tobytes()


def split(data: bytes, cuts) -> list[bytes]:
    ends = [0, *sorted(cuts), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(ends)]


@pytest.mark.parametrize("size", [*range(130), 1000, 4096, 65_537, len(DATA)])
def test_digests_of_the_standard(size):
    data = DATA[:size]
    assert container.digest_of([data]) == f"{zlib.crc32(data):08x}"


def test_where_the_buffers_end_does_not_matter():
    rng = np.random.default_rng(1)
    for _ in range(300):
        data = DATA[: int(rng.integers(0, 700))]
        parts = split(data, rng.integers(0, len(data) + 1, rng.integers(0, 6)).tolist())
        want = f"{zlib.crc32(data):08x}"
        assert container.digest_of(parts) == want
        assert container.digest_of([memoryview(p) for p in parts]) == want


def test_without_the_library(monkeypatch):
    want = [f"{zlib.crc32(DATA[:n]):08x}" for n in (3, len(DATA))]

    def missing():
        raise KernelError("libpennyweight is not installed")

    monkeypatch.setattr(library, "load", missing)
    assert [container.digest_of([DATA[:n]]) for n in (3, len(DATA))] == want


@pytest.fixture(params=["native", "python"])
def path(request, zoo, tmp_path, monkeypatch):
    if request.param == "python":

        def missing():
            raise KernelError("libpennyweight is not installed")

        monkeypatch.setattr(library, "load", missing)
    write_dwt(zoo, tmp_path / "a.dwt")
    return tmp_path / "a.dwt"


def test_damage_is_told(path):
    container.read_container(path)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(FormatError, match="the checksum does not match"):
        container.read_container(path)
    container.read_container(path, check=False)


def test_many_files_at_once(path):
    wrong = []

    def work():
        for _ in range(10):
            try:
                container.read_container(path)
            except FormatError as error:
                wrong.append(error)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert wrong == []


@pytest.fixture
def large(tmp_path, zoo):
    """A file large enough for its checksum to be taken by a thread of its own."""
    program = ir.replace(
        zoo, constants={**zoo.constants, "spare": ir.Constant("u8", np.frombuffer(DATA * 3, np.uint8))}
    )
    write_dwt(program, tmp_path / "large.dwt")
    assert (tmp_path / "large.dwt").stat().st_size > 3 * container._ASIDE
    return tmp_path / "large.dwt"


def test_damage_to_a_large_file_is_told(large):
    assert read(large).ops
    good = large.read_bytes()
    for place in (len(good) - 1, len(good) // 2):
        data = bytearray(good)
        data[place] ^= 1
        large.write_bytes(data)
        with pytest.raises(FormatError, match=r"the checksum does not match.*large\.dwt"):
            container.read_container(large)
        with pytest.raises(FormatError, match="the checksum does not match"):
            read(large)
        assert read(large, check_sum=False).ops


def test_damage_comes_before_what_it_has_done_to_the_program(large):
    data = large.read_bytes()
    place = data.index(b"requant")
    large.write_bytes(data[:place] + b"!" + data[place + 1 :])
    with pytest.raises(FormatError, match="the checksum does not match"):
        read(large)
    with pytest.raises(FormatError, match="unknown"):
        read(large, check_sum=False)


def test_a_checksum_that_nobody_waits_for(large):
    for _ in range(20):
        container.opened(large)  # the file's memory goes only when the thread has done with it

"""The checksum: the digest of the standard, from whichever code computes it, and a wait that tells of damage."""

import hashlib
import itertools
import threading

import numpy as np
import pytest

from pennyweight.errors import FormatError, KernelError
from pennyweight.exporters.dwt import write_dwt
from pennyweight.runtime import container, library

DATA = np.random.default_rng(0).integers(0, 256, 1 << 20, dtype=np.uint8).tobytes()


def split(data: bytes, cuts) -> list[bytes]:
    ends = [0, *sorted(cuts), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(ends)]


@pytest.mark.parametrize("size", [*range(130), 1000, 4096, 65_537, len(DATA)])
def test_digests_of_the_standard(size):
    data = DATA[:size]
    assert container.digest_of([data]) == hashlib.sha256(data).hexdigest()


def test_where_the_buffers_end_does_not_matter():
    rng = np.random.default_rng(1)
    for _ in range(300):
        data = DATA[: int(rng.integers(0, 700))]
        parts = split(data, rng.integers(0, len(data) + 1, rng.integers(0, 6)).tolist())
        want = hashlib.sha256(data).hexdigest()
        assert container.digest_of(parts) == want
        assert container.digest_of([memoryview(p) for p in parts]) == want


def test_without_the_library(monkeypatch):
    want = [hashlib.sha256(DATA[:n]).hexdigest() for n in (3, len(DATA))]

    def missing():
        raise KernelError("libpennyweight is not installed")

    monkeypatch.setattr(library, "load", missing)
    assert [container.digest_of([DATA[:n]]) for n in (3, len(DATA))] == want


@pytest.fixture(params=["native", "python"])
def path(request, zoo, tmp_path, monkeypatch):
    if request.param == "python":
        monkeypatch.setattr(container, "_begin_native", lambda parts: (None, None))
    write_dwt(zoo, tmp_path / "a.dwt")
    return tmp_path / "a.dwt"


def test_an_open_container_waits_for_its_checksum(path):
    found, wait = container.open_container(path)
    wait()
    wait()  # and again: it has been compared
    assert found.tensors


def test_damage_is_told_by_the_wait(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    _, wait = container.open_container(path)
    for _ in range(2):
        with pytest.raises(FormatError, match="the checksum does not match"):
            wait()
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


def test_a_digest_that_nobody_waits_for(path):
    for _ in range(20):
        container.open_container(path)

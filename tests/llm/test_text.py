"""Text as token ids."""

import json

import numpy as np
import pytest
import torch

from pennyweight.errors import InputError
from pennyweight.llm.directory import Directory
from pennyweight.llm.text import read_tokens, windows


@pytest.fixture
def folder(llama):
    return Directory(llama)


def test_text_lines_and_arrays_give_the_same_ids(folder, tmp_path):
    (tmp_path / "a.txt").write_text("hello world")
    ids = read_tokens(tmp_path / "a.txt", folder)
    assert len(ids) == 11 and len(set(ids[:5].tolist())) == 4
    (tmp_path / "a.jsonl").write_text('{"text": "hello "}\n\n{"text": "world"}\n')
    (tmp_path / "b.jsonl").write_text(json.dumps({"input_ids": ids.tolist()}))
    np.save(tmp_path / "c.npy", ids.numpy().astype(np.uint16).reshape(1, -1))
    np.savez(tmp_path / "d.npz", ids=ids.numpy())
    torch.save(ids, tmp_path / "e.pt")
    for name in ("a.jsonl", "b.jsonl", "c.npy", "d.npz", "e.pt"):
        assert torch.equal(read_tokens(tmp_path / name, folder), ids), name


def test_what_holds_no_ids_is_refused(folder, tmp_path):
    def refused(name, words):
        with pytest.raises(InputError, match=words):
            read_tokens(tmp_path / name, folder)

    refused("none.txt", "no such file")
    (tmp_path / "empty.txt").write_text("")
    refused("empty.txt", "no token")
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"txet": 1}\n')
    refused("bad.jsonl", "bad.jsonl:2")
    np.save(tmp_path / "f.npy", np.zeros(4, np.float32))
    refused("f.npy", "float32 holds no token ids")
    np.save(tmp_path / "g.npy", np.array([3, 256]))
    refused("g.npy", "vocabulary has 256")
    (tmp_path / "h.npy").write_bytes(b"nonsense")
    refused("h.npy", "no array")
    (tmp_path / "latin.txt").write_bytes(b"\xff\xfe\x00")
    refused("latin.txt", "UTF-8")


def test_text_needs_a_tokenizer(llama, tmp_path):
    import shutil

    shutil.copytree(llama, tmp_path / "bare")
    (tmp_path / "bare" / "tokenizer.json").unlink()
    (tmp_path / "a.txt").write_text("hello")
    with pytest.raises(InputError, match="no tokenizer"):
        read_tokens(tmp_path / "a.txt", Directory(tmp_path / "bare"))


def test_windows_do_not_overlap_where_there_is_text_enough():
    ids = torch.arange(100)
    found = windows(ids, 10, 6, seed=3)
    assert found.shape == (6, 10) and len(set(found.flatten().tolist())) == 60
    assert torch.equal(found, windows(ids, 10, 6, seed=3))
    assert not torch.equal(found, windows(ids, 10, 6, seed=4))
    more = windows(ids, 60, 5, seed=0)
    assert more.shape == (5, 60) and bool((more[:, 1:] - more[:, :-1] == 1).all())


def test_a_text_shorter_than_one_window_is_refused():
    with pytest.raises(InputError, match="9 tokens, one window needs 10"):
        windows(torch.arange(9), 10, 1, seed=0)

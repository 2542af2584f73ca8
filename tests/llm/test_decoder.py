"""One program for a whole language model: what it says token by token is what the model says of whole windows."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from pennyweight.errors import FormatError, InputError
from pennyweight.llm.evaluate import decoded_perplexity, generate, perplexity
from pennyweight.llm.load import load, logits
from pennyweight.llm.quantize import quantize
from pennyweight.llm.request import Request
from pennyweight.runtime.decode import Decoding, load_decoding


@pytest.fixture(scope="module")
def file(llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dwt")
    quantize(llama, folder / "own", Request("w4a8", head="w8a8"))
    quantize(llama, folder / "model.dwt", Request("w4a8", head="w8a8", to="dwt"))
    return folder / "model.dwt"


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_steps_of_any_length_are_the_whole_window(file, ids, backend):
    want = logits(load(file.parent / "own"), ids[:1])[0].numpy()
    decoding = load_decoding(file, backend=backend, threads=1)
    places = [0, 7, 8, 9, 20] if backend == "reference" else range(24)
    seen = 0
    for end in places:
        got = decoding.step(ids[0, seen : end + 1].tolist())
        assert np.abs(got - want[end]).max() < 2e-3 * np.abs(want).max(), end
        seen = end + 1


def test_keys_and_values_of_8_bits(file, ids):
    from pennyweight.llm.decoder import lower_decoder
    from pennyweight.runtime.session import Session

    program = lower_decoder(load(file.parent / "own"), cache="int8")
    want = logits(load(file.parent / "own"), ids[:1])[0].numpy()
    whole, single = (Decoding(Session(program, threads=1)) for _ in range(2))
    reference = Decoding(Session(program, backend="reference"))
    for token in ids[0].tolist():
        got = single.step([token])
    n = len(ids[0])
    assert [k.dtype for k in single._kept] == [np.uint8, np.float32]
    first = whole.step(ids[0, : n // 2].tolist())
    last = whole.step(ids[0, n // 2 :].tolist())
    top = np.abs(want).max()
    assert np.abs(last - got).max() < 2e-3 * top  # one by one or many at once: the same codes are kept
    assert np.abs(reference.step(ids[0, : n // 2].tolist()) - first).max() < 1e-3 * top
    assert 0 < np.abs(last - want[-1]).max() < 0.05 * top


def test_generation_is_that_of_transformers_past_the_first_stride(file):
    model = load(file.parent / "own")
    start = [5, 6, 7, 9]
    decoding = load_decoding(file, threads=1)
    found = list(decoding.generate(start, tokens=90))
    assert found == generate(model, torch.tensor(start), tokens=90)[4:].tolist()
    assert decoding.count == 4 + 89
    decoding.begin()
    assert list(decoding.generate(start, tokens=5)) == found[:5]
    decoding.begin()
    warm = list(decoding.generate(start, tokens=5, temperature=50.0, seed=1))
    assert warm != found[:5]


def test_perplexity_of_the_file(file, ids):
    want = perplexity(load(file.parent / "own"), ids.flatten(), 24, limit=3)
    got = decoded_perplexity(load_decoding(file, threads=1), ids.flatten(), 24, limit=3)
    assert got.value == pytest.approx(want.value, rel=1e-3)


def test_the_window_is_kept(file):
    decoding = load_decoding(file, threads=1)
    with pytest.raises(InputError, match="no token"):
        decoding.step([])
    with pytest.raises(InputError, match="made for 256"):
        decoding.step([1] * 257)
    decoding.step([1] * 250)
    assert len(list(decoding.generate([2], tokens=50))) == 6


def test_other_programs_are_refused(zoo):
    from pennyweight.runtime.session import Session

    with pytest.raises(FormatError, match="no language model"):
        Decoding(Session(zoo, backend="reference"))


def test_decoding_does_without_torch(file):
    code = (
        "import sys; from pennyweight.cli.main import main; "
        f"assert main(['llm', 'generate', {str(file)!r}, '--prompt', 'abc', '--tokens', '4', '--json']) == 0; "
        "print('torch' in sys.modules, 'transformers' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.split() == ["False", "False"]
    assert '"text": "abc' in done.stdout


def test_what_has_no_kernels_is_refused(llama, tmp_path):
    with pytest.raises(InputError, match="8 bits"):
        quantize(llama, tmp_path / "out.dwt", Request("w4a4", to="dwt"))

"""Language models trained by two processes: the directory of one, and refusals that reach both."""

import contextlib
import io
import json
import os
import socket
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tests.llm.conftest import make_llama, make_tokenizer

from pennyweight.cli.main import main
from pennyweight.errors import InputError, NonFinite, PennyweightError
from pennyweight.llm import shards
from pennyweight.llm.directory import Directory
from pennyweight.llm.load import load
from pennyweight.llm.targets import readers, targets
from pennyweight.llm.train import Training, train

if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("this torch has no gloo", allow_module_level=True)

SMALL = {"steps": 3, "lr": 3e-3, "batch": 4, "window": 16}
CASES = {
    "weights": ("tied", Training("w4a8", **SMALL)),
    "lora": ("apart", Training("w4a16", head="w8a16", lora=3, **SMALL)),
}


def text() -> torch.Tensor:
    steps = torch.randint(0, 2, (1000,), generator=torch.Generator().manual_seed(3))
    return steps.cumsum(0) % 32


def losses(source, out, request, ids=None):
    said = []
    train(source, out, request, text() if ids is None else ids, said.append)
    return [e["loss"] for e in said if e["what"] == "trained"]


def refusals(folder, rank):
    """What each process is told when all are wrong, when one is, and when process 0 cannot write."""
    source, out = f"{folder}/tied", f"{folder}/no"

    def told(request, ids=None):
        with pytest.raises(PennyweightError) as caught:
            losses(source, out, request, ids)
        return type(caught.value), str(caught.value)

    found = {
        "batch": told(Training(**{**SMALL, "batch": 3})),
        "texts": told(Training(**SMALL), text()[rank:]),
        "options": told(Training(**{**SMALL, "seed": rank})),
        "nan": told(Training(**{**SMALL, "lr": 1e30})),
    }

    def full(*_):
        raise InputError("no disk space")

    kept = targets["pennyweight"].write
    targets["pennyweight"].write = full
    found["write"] = told(Training(**{**SMALL, "steps": 1}))
    targets["pennyweight"].write = kept
    return found


def command(folder, name, out):
    """Words of the command line that train a case."""
    source, r = CASES[name]
    options = {"text": f"{folder}/text.pt", "scheme": r.scheme, **SMALL}
    given = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    return ["llm", "train", f"{folder}/{source}", "-o", f"{folder}/{out}", "--json", *given]


def by_command(folder, name):
    """What the command line prints under a launcher, that is with a launcher's environment."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = main(command(folder, name, f"two-{name}"))
    assert code == 0
    return printed.getvalue()


def worker(rank, ports, folder):
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(ports[0]), RANK=str(rank), WORLD_SIZE="2")
    printed = by_command(folder, "weights")
    assert not dist.is_initialized()
    os.environ["MASTER_PORT"] = str(ports[1])
    with shards.launched():
        source, request = CASES["lora"]
        said = {
            "weights": [e["loss"] for e in json.loads(printed)["events"] if e["what"] == "trained"]
            if printed
            else [],
            "lora": losses(f"{folder}/{source}", f"{folder}/two-lora", request),
        }
        torch.save({"losses": said, "refused": refusals(folder, rank)}, f"{folder}/{rank}.pt")
    os._exit(0)  # as in tests/training/test_distributed.py


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder where one process trained, then two; what each of the two said; and the losses of the one."""
    folder = tmp_path_factory.mktemp("shards")
    for name, tied in (("tied", True), ("apart", False)):
        make_llama(folder / name, tie_word_embeddings=tied, num_hidden_layers=2)
        make_tokenizer(folder / name)
    alone = {name: losses(folder / source, folder / f"one-{name}", r) for name, (source, r) in CASES.items()}
    torch.save(text(), folder / "text.pt")
    with socket.socket() as one, socket.socket() as two:
        for bound in (one, two):
            bound.bind(("127.0.0.1", 0))
        ports = [bound.getsockname()[1] for bound in (one, two)]
    mp.spawn(worker, (ports, str(folder)), nprocs=2)
    return folder, [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)], alone


def same(one, two, source):
    """Two directories hold the same model but for the order of float sums, which flips a code here and there."""
    layers, others = (readers["pennyweight"](Directory(p))[0] for p in (one, two))
    assert layers.keys() == others.keys() and layers
    codes = [(layers[n].weight.codes, others[n].weight.codes) for n in layers]
    assert sum(int((a != b).sum()) for a, b in codes) < 2e-3 * sum(a.numel() for a, _ in codes)
    scales = [torch.cat([f[n].weight.scales().flatten() for n in layers]) for f in (layers, others)]
    far = (scales[0] / scales[1] - 1).abs() > 2e-3  # more than a step or two of half precision
    assert float(far.float().mean()) < 1e-2
    names = [n for n in Directory(one).names if n.endswith(("norm.weight", "embed_tokens.weight"))]
    assert len(names) == 6
    floats, theirs, base = (Directory(p).floats(names) for p in (one, two, source))
    for n in names:  # what is between them, beside what training moved
        assert float((floats[n] - theirs[n]).norm()) <= 1e-2 * float((floats[n] - base[n]).norm()), n
    return {n: torch.equal(floats[n], base[n]) for n in names}


@pytest.mark.parametrize("case", list(CASES))
def test_two_processes_write_what_one_writes(trained, case):
    folder, told, alone = trained
    assert told[1]["losses"][case] == []  # process 0 reports
    assert told[0]["losses"][case] == pytest.approx(alone[case], rel=1e-4)
    assert len(alone[case]) == SMALL["steps"] and alone[case][-1] < alone[case][0]
    kept = same(folder / f"one-{case}", folder / f"two-{case}", folder / CASES[case][0])
    assert set(kept.values()) == {case == "lora"}  # beside low ranks floats stay
    assert load(folder / f"two-{case}").can_generate()


def test_the_launcher_starts_the_same_command(trained):
    folder, _, alone = trained
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m",
             "pennyweight.cli.main"]  # fmt: skip
    words = command(folder, "weights", "launched")
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*start, *words], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    said = json.loads(done.stdout)["events"]  # one process alone prints
    assert [e["loss"] for e in said if e["what"] == "trained"] == pytest.approx(alone["weights"], rel=1e-4)
    same(folder / "one-weights", folder / "launched", folder / CASES["weights"][0])


def test_what_goes_wrong_ends_both_processes(trained):
    folder, told, _ = trained
    for case, kind, words in (
        ("batch", InputError, "3 windows of a step cannot be shared by 2 processes. Use --batch 4."),
        ("texts", InputError, "processes 0 and 1 were given different texts"),
        ("options", InputError, "processes 0 and 1 were given different options"),
        ("nan", NonFinite, "the loss is nan at step 1"),
    ):
        for found in told:
            assert found["refused"][case][0] is kind and words in found["refused"][case][1]
    assert told[0]["refused"]["write"] == (InputError, "no disk space")
    assert told[1]["refused"]["write"] == (PennyweightError, "process 0 ended: no disk space")
    assert not list(folder.glob("no*")) and not list(folder.glob(".*"))

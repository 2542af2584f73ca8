"""Two processes over gloo train as one does on the same global batch, and agree on every quantizer."""

import copy
import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn

import pennyweight as pw
from pennyweight import training

if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("this torch has no gloo", allow_module_level=True)

STEPS, LR = 4, 0.1
CASES = [("lsq", "lsq", True), ("clipped", "clipped", False), ("lsq", "lsq", False)]


def network() -> nn.Module:
    """No batch norm: torch synchronises its statistics on GPUs alone."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2),
        nn.Flatten(), nn.Linear(32, 16), nn.GELU(), nn.Linear(16, 4),
    )  # fmt: skip


def data() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(16, 3, 8, 8), torch.arange(16) % 4


def made(weight: str, signal: str, calibrated: bool) -> nn.Module:
    model = training.prepare(network(), data()[0], weight=weight, input=signal)
    if calibrated:
        pw.calibrate(model, [data()[0]], progress=False)
    return model


def train(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> None:
    optimizer = torch.optim.SGD(model.parameters(), LR, 0.9)
    model.train()
    for _ in range(STEPS):
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def whole(value: torch.Tensor) -> torch.Tensor:
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def worker(rank: int, port: int, how: str, case: tuple[str, str, bool], folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    try:
        model = made(*case)
        x, y = (t[rank * 8 : rank * 8 + 8] for t in data())
        if how == "ddp":
            wrapped = nn.parallel.DistributedDataParallel(model)
            train(wrapped, x, y)
        else:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            mesh = init_device_mesh("cpu", (2,))
            for layer in model:
                if next(layer.parameters(), None) is not None:
                    fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
            train(model, x, y)
        state = {name: whole(value).clone() for name, value in model.state_dict().items()}
        torch.save(state, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()
    # torch's communication threads may outlive their group; one that asks a finishing Python 3.11 for its lock aborts
    os._exit(0)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.mark.parametrize(
    ("how", "case"),
    [("ddp", c) for c in CASES] + [("fsdp2", c) for c in CASES[:2]],
    ids=lambda c: c if isinstance(c, str) else "-".join(map(str, c)),
)
def test_two_processes_equal_one(tmp_path, how, case):
    alone = made(*case)
    train(alone, *data())
    mp.spawn(worker, (free_port(), how, case, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    want = alone.state_dict()
    assert first.keys() == want.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]) or (value != value).all(), name
        assert torch.allclose(value, want[name], rtol=1e-3, atol=2e-5), name


def test_ranges_lost_in_shards_are_named(tmp_path):
    with pytest.raises(Exception, match="before fully_shard"):
        mp.spawn(worker, (free_port(), "fsdp2", CASES[2], str(tmp_path)), nprocs=2)


def test_a_sharded_model_converts_after_gathering(tmp_path):
    """What FSDP2 trained loads into an unsharded twin and converts."""
    mp.spawn(worker, (free_port(), "fsdp2", CASES[0], str(tmp_path)), nprocs=2)
    model = copy.deepcopy(made(*CASES[0]))
    model.load_state_dict(torch.load(tmp_path / "0.pt", weights_only=True))
    model.eval()
    with torch.no_grad():
        assert torch.allclose(pw.convert(model)(data()[0]), model(data()[0]), atol=0.05)

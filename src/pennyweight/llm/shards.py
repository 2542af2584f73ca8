"""Training by several processes: parameters, gradients and moments cut among them, block by block (FSDP2).

Every process draws the same global batch and takes its own rows of it; gradients are the mean over all:

    dL/dw = 1/n sum_r dL_r/dw,   L_r the mean over the rows of process r, as many for each

which is the gradient of one process on the whole batch, but for the order of sums. A block's parameters are whole in a
process while it computes, forward and backward, and cut again after it.
Source: Zhao et al. 2023, PyTorch FSDP (arXiv:2304.11277), section 3; `torch.distributed.fsdp.fully_shard`.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from pennyweight.errors import InputError, PennyweightError

began = False  # a group of processes, by `launched`


def count() -> int:
    """Processes of the group; 1 where there is none."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if count() > 1 else 0


@contextmanager
def launched() -> Iterator[None]:
    """The process group that a launcher such as `torchrun` describes in the environment, over gloo; else nothing.

    Raises:
        InputError: if this torch has no gloo.
    """
    described = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()
    if not described or int(os.environ["WORLD_SIZE"]) < 2 or count() > 1:
        yield
        return
    if not (dist.is_available() and dist.is_gloo_available()):
        raise InputError("this torch has no gloo, over which several processes would train",
                         hint="Start one process.")  # fmt: skip
    global began
    began = True
    dist.init_process_group("gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def check(batch: int, asked: Any, ids: Tensor) -> None:
    """Refuse what processes cannot do together, in all of them alike.

    Args:
        batch: windows of a step, of all processes together.
        asked: what is wanted, printable; the same for all.
        ids: of the text; the same for all.

    Raises:
        InputError: with the reason.
    """
    if count() == 1:
        return
    if "cpu:" not in dist.get_backend_config():
        raise InputError("processes train on their CPUs here, and their group has no backend for these",
                         spec=dist.get_backend_config(), hint="Use gloo.")  # fmt: skip
    mine = (repr(asked), len(ids), zlib.crc32(ids.contiguous().numpy().tobytes()))
    all_: list[Any] = [None] * count()
    dist.all_gather_object(all_, mine)
    for number, other in enumerate(all_):
        if other != all_[0]:
            what = "options" if other[0] != all_[0][0] else "texts"
            raise InputError(f"processes 0 and {number} were given different {what}",
                             hint="Start all of them with one command.")  # fmt: skip
    if batch % count():
        raise InputError(f"{batch} windows of a step cannot be shared by {count()} processes",
                         hint=f"Use --batch {-(-batch // count()) * count()}.")  # fmt: skip


def rows(batch: int) -> slice:
    """The rows of a global batch that are this process's own."""
    own = batch // count()
    return slice(rank() * own, (rank() + 1) * own)


def shard(model: nn.Module, blocks: Sequence[str]) -> None:
    """Cut a model's parameters among the processes; a single one keeps it as it is.

    Args:
        model: the same in all processes; changed in place.
        blocks: paths of its blocks, each gathered alone; the rest is gathered together.
    """
    if count() == 1:
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (count(),))
    for path in blocks:
        fully_shard(model.get_submodule(path), mesh=mesh)
    fully_shard(
        model, mesh=mesh, reshard_after_forward=True
    )  # tables too: the default keeps the outermost whole


@contextmanager
def whole(module: nn.Module) -> Iterator[None]:
    """The parameters of a module that `shard` cut are whole within, in every process; those of others are as they are.

    All processes must enter.
    """
    cut = hasattr(module, "unshard")
    if cut:
        module.unshard()  # type: ignore[operator]
    try:
        yield
    finally:
        if cut:
            module.reshard()  # type: ignore[operator]


class Alone:
    """What process 0 does for all, step by step; its first failure is kept until all of them can end with it."""

    def __init__(self) -> None:
        self.failure: Exception | None = None

    def __call__(self, work: Callable[[], None]) -> None:
        """Do this in process 0, unless something went wrong before."""
        if rank() == 0 and self.failure is None:
            try:
                work()
            except Exception as error:  # to be raised by `settle`: the others would wait for ever
                self.failure = error

    def settle(self) -> None:
        """All processes wait here for what was done.

        Raises:
            Exception: the failure, in process 0.
            PennyweightError: that says it, in the others.
        """
        if count() > 1:
            told: list[str | None] = [None if self.failure is None else str(self.failure)]
            dist.broadcast_object_list(told, 0)
            if rank() and told[0] is not None:
                raise PennyweightError(f"process 0 ended: {told[0]}")
        if self.failure is not None:
            raise self.failure

"""What went into a module, batch by batch, kept so that mini-batches can be drawn from it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from pennyweight.errors import CalibrationError
from pennyweight.graph.record import call
from pennyweight.nn.sites import aside
from pennyweight.reconstruction.capture import visit


@dataclass
class Samples:
    """Arguments of a module's calls.

    Attributes:
        leaves: by place. Where the first axis counts samples in every batch, one tensor of all of them; else what was
            the same in every batch.
        stacked: which places hold samples.
        count: number of samples.
        ragged: whether sizes differ from batch to batch. Then a place holds a list, and a batch is drawn as it came.
    """

    leaves: list[Any]
    stacked: list[bool]
    count: int
    ragged: bool
    tree: TreeSpec

    @classmethod
    def of(cls, calls: list[tuple[tuple[Any, ...], dict[str, Any]]]) -> Samples:
        """From the arguments of one call a batch.

        Raises:
            CalibrationError: if there is none, or the structure changes from one to the next.
        """
        if not calls:
            raise CalibrationError("no batch reached this block", hint="Calibrate with inputs that do.")
        flat = [tree_flatten(c) for c in calls]
        tree = flat[0][1]
        if any(f[1] != tree for f in flat):
            raise CalibrationError("a block is called with other arguments from batch to batch")
        sizes = [next((x.shape[0] for x in f[0] if isinstance(x, Tensor) and x.ndim), 1) for f in flat]
        leaves: list[Any] = []
        stacked: list[bool] = []
        ragged = False
        for place in zip(*(f[0] for f in flat), strict=True):
            tensors = all(isinstance(x, Tensor) and x.ndim for x in place)
            rows = tensors and all(x.shape[0] == n for x, n in zip(place, sizes, strict=True))
            if rows and len({x.shape[1:] for x in place}) == 1:
                leaves.append(torch.cat(place))
            elif tensors and (rows or any(not torch.equal(x, place[0]) for x in place)):
                leaves.append(list(place))
                ragged = True
            else:
                leaves.append(place[0])
            stacked.append(rows)
        if ragged:
            leaves, stacked = [list(p) for p in zip(*(f[0] for f in flat), strict=True)], []
        return cls(leaves, stacked, len(calls) if ragged else sum(sizes), ragged, tree)

    def take(self, index: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of the samples of these numbers; of a ragged set of the first one alone."""
        if self.ragged:
            leaves = [place[int(index[0])] for place in self.leaves]
        else:
            leaves = [x[index] if s else x for x, s in zip(self.leaves, self.stacked, strict=True)]
        args, kwargs = tree_unflatten(leaves, self.tree)
        return args, kwargs

    def mixed(self, other: Samples, index: Tensor, share: float) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """As `take`, with a random share of the floating values from another set of the same calls."""
        mine, theirs = (tree_flatten(s.take(index))[0] for s in (self, other))
        out = [
            torch.where(torch.rand(a.shape) < share, b, a)
            if isinstance(a, Tensor) and a.is_floating_point() and a.shape == b.shape
            else a
            for a, b in zip(mine, theirs, strict=True)
        ]
        args, kwargs = tree_unflatten(out, self.tree)
        return args, kwargs


def inputs_of(model: nn.Module, batches: Iterable[Any], module: nn.Module) -> Samples:
    """What goes into a module over the batches.

    Raises:
        CalibrationError: see `Samples.of`.
    """
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    visit(model, batches, module, lambda args, kwargs: calls.append((args, kwargs)))
    return Samples.of(calls)


def first_tensor(result: Any) -> Tensor:
    """The result of a block, or the first of several."""
    return next(x for x in tree_flatten(result)[0] if isinstance(x, Tensor))


def fisher(model: nn.Module, batches: Iterable[Any], module: nn.Module, seed: int) -> list[Tensor]:
    """Weights of errors by the Fisher information of a module's result, batch by batch, in the shape of the result.

        F = (d log p(y | x) / d z)^2,  y drawn from the model's own p;  weight = (1 + F / mean F) / 2

    A result of two axes is taken for the logits of classes; of others every value for the mean of a normal
    distribution. Of single samples F is heavy-tailed: alone it would leave most errors to a few samples that the model
    is unsure of, hence the 1. The mean of all weights is 1.
    Source: Li et al. 2021, "BRECQ" (arXiv:2102.05426), section 3.2; the 1 is ours, its size not tuned.
    """
    kept: list[Tensor] = []
    gen = torch.Generator().manual_seed(seed)

    def keep(_: nn.Module, args: Any, result: Any) -> Any:
        z = first_tensor(result).detach().requires_grad_()
        kept.append(z)
        leaves, tree = tree_flatten(result)
        place = next(i for i, x in enumerate(leaves) if isinstance(x, Tensor))
        with aside():
            leaves[place] = z * 1.0  # what follows may change its operand in place
        return tree_unflatten(leaves, tree)

    out: list[Tensor] = []
    handle = module.register_forward_hook(keep)
    try:
        for batch in batches:
            kept.clear()
            with torch.enable_grad():
                y = first_tensor(call(model, batch))
                if y.ndim == 2 and y.shape[1] > 1:
                    chosen = torch.multinomial(y.detach().float().softmax(1), 1, generator=gen)
                    loss = -y.float().log_softmax(1).gather(1, chosen).sum()
                else:
                    loss = (y * torch.randn(y.shape, generator=gen)).sum()
                (gradient,) = torch.autograd.grad(loss, kept[:1])
            out.append(gradient.detach() ** 2)
    finally:
        handle.remove()
    mean = float(torch.cat([f.flatten() for f in out]).mean()) or 1.0
    return [(1 + f / mean) / 2 for f in out]

"""Sensitivity from derivatives: Fisher information from one backward pass, Hessian traces by Hutchinson's probes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves

from pennyweight.errors import InputError, nearest
from pennyweight.graph.record import call

Task = Literal["auto", "logits", "values"]
TASKS = ("auto", "logits", "values")


def task_of(output: Tensor, task: str = "auto") -> str:
    """Whether rows [..., n] are logits of classes or values: rows of one length (embeddings) and single numbers are.

    Raises:
        InputError: on another task.
    """
    if task not in TASKS:
        raise InputError(f"there is no task {task!r}", hint=nearest(task, TASKS, "tasks"))
    if task != "auto":
        return task
    rows = output.detach().float().reshape(-1, output.shape[-1])
    lengths = rows.norm(dim=-1)
    alike = bool((lengths.max() - lengths.min()) <= 1e-3 * lengths.max().clamp_min(1e-12))
    return "values" if rows.shape[-1] < 2 or (alike and len(rows) > 1) else "logits"


def drawn_loss(output: Tensor, task: str, generator: torch.Generator) -> Tensor:
    """The negative log likelihood of targets drawn from the model itself, summed over rows [..., n].

    Logits: a class y ~ softmax. Values: `1/2 |z - (z + e)|^2`, e ~ N(0, 1). Gradients of rows drawn so are independent
    with mean zero, so that the square of a batch's gradient is, in the mean, the sum of its rows' squares: one
    backward pass gives the diagonal of the Fisher information.
    """
    rows = output.float().reshape(-1, output.shape[-1])
    if task == "logits":
        target = torch.multinomial(rows.detach().softmax(-1), 1, generator=generator)[:, 0]
        return F.cross_entropy(rows, target, reduction="sum")
    noise = torch.randn(rows.shape, generator=generator)
    return 0.5 * ((rows - (rows.detach() + noise)) ** 2).sum()


@dataclass(frozen=True)
class Fisher:
    """Traces of the Fisher information per sample, by site, and the parts of FIT.

    Attributes:
        weights: `Tr I(W) = E sum g^2` by weight site.
        inputs: the same of activations.
    """

    weights: dict[str, float]
    inputs: dict[str, float]


def first_output(result: Any) -> Tensor:
    """The first float tensor of a model's results."""
    found = [
        t
        for t in tree_leaves(result)
        if isinstance(t, Tensor) and t.is_floating_point() and t.ndim and t.numel()
    ]
    if not found:
        raise InputError("the model returns no float tensor to differentiate")
    return found[0]


def fisher(
    model: nn.Module,
    batches: Sequence[Any],
    weights: Mapping[str, Tensor],
    sites: Mapping[str, nn.Module],
    *,
    task: str = "auto",
    seed: int = 0,
) -> Fisher:
    """Fisher traces of weights and activations, one backward pass a batch.

    Args:
        model: in eval mode, computing in float.
        batches: inputs.
        weights: parameters by site; gradients are taken without touching their `.grad`.
        sites: modules whose input is looked at, by site.
        task: see `task_of`.
        seed: of the targets.

    Source: Zandonati et al. 2022, "FIT: A Metric for Model Sensitivity" (arXiv:2210.08502), section 3.
    """
    generator = torch.Generator().manual_seed(seed)
    seen: dict[str, list[Tensor]] = {}

    def watch(site: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            if isinstance(args[0], Tensor) and args[0].requires_grad:
                seen.setdefault(site, []).append(args[0])

        return hook

    handles = [module.register_forward_pre_hook(watch(site)) for site, module in sites.items()]
    total_w, total_a = dict.fromkeys(weights, 0.0), dict.fromkeys(sites, 0.0)
    rows = 0
    try:
        with _differentiable(weights.values()), torch.enable_grad():
            for batch in batches:
                seen.clear()
                output = first_output(call(model, batch))
                loss = drawn_loss(output, task_of(output, task), generator)
                rows += output.numel() // output.shape[-1]
                wanted = [*weights.values(), *(t for tensors in seen.values() for t in tensors)]
                grads = iter(torch.autograd.grad(loss, wanted, allow_unused=True))
                for site in weights:
                    total_w[site] += _square(next(grads))
                for site, tensors in seen.items():
                    total_a[site] += sum(_square(next(grads)) for _ in tensors)
    finally:
        for handle in handles:
            handle.remove()
    return Fisher(
        {site: total / max(rows, 1) for site, total in total_w.items()},
        {site: total / max(rows, 1) for site, total in total_a.items()},
    )


def _square(gradient: Tensor | None) -> float:
    return 0.0 if gradient is None else float((gradient.double() ** 2).sum())


class _differentiable:  # noqa: N801 (a context manager that reads as a phrase)
    """Parameters require gradients for a while."""

    def __init__(self, tensors: Any) -> None:
        self.tensors = [(t, t.requires_grad) for t in tensors]

    def __enter__(self) -> None:
        for tensor, _ in self.tensors:
            tensor.requires_grad_(True)

    def __exit__(self, *_: object) -> None:
        for tensor, before in self.tensors:
            tensor.requires_grad_(before)


def hessian_traces(
    model: nn.Module,
    batches: Sequence[Any],
    weights: Mapping[str, Tensor],
    *,
    loss: Callable[[Any], Tensor] | None = None,
    probes: int = 50,
    task: str = "auto",
    seed: int = 0,
) -> dict[str, float]:
    """`Tr H_l ~ mean over probes of v_l^T (H v)_l`, v of random signs over all weights at once, by weight site.

    One Hessian-vector product a probe serves all layers: terms between layers have mean zero.

    Args:
        model: in eval mode, computing in float, of functions that can be differentiated twice.
        batches: inputs; the loss is the mean over them.
        weights: parameters by site.
        loss: of a model's result; by default the likelihood of targets drawn from the model, a mean over rows.
        probes: how many.
        task: see `task_of`.
        seed: of signs and targets.

    Source: Dong et al. 2020, "HAWQ-V2" (arXiv:1911.03852), section 3; Hutchinson 1990.
    """
    names, tensors = list(weights), list(weights.values())
    totals = dict.fromkeys(names, 0.0)
    # fused attention has no second derivative
    with _differentiable(tensors), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        for batch in batches:
            generator = torch.Generator().manual_seed(seed)
            result = call(model, batch)
            if loss is None:
                output = first_output(result)
                rows = output.numel() // output.shape[-1]
                value = drawn_loss(output, task_of(output, task), generator) / rows
            else:
                value = loss(result)
            grads = torch.autograd.grad(value, tensors, create_graph=True, allow_unused=True)
            used = [i for i, g in enumerate(grads) if g is not None and g.requires_grad]
            for _ in range(probes):
                signs = [
                    torch.randint(0, 2, t.shape, generator=generator).float() * 2 - 1
                    for t in (tensors[i] for i in used)
                ]
                along = torch.stack([(grads[i] * v).sum() for i, v in zip(used, signs, strict=True)]).sum()
                products = torch.autograd.grad(
                    along, [tensors[i] for i in used], retain_graph=True, allow_unused=True
                )
                for i, v, hv in zip(used, signs, products, strict=True):
                    if hv is not None:
                        totals[names[i]] += float((v * hv).sum().double()) / (probes * len(batches))
    return totals

"""Run a model as far as one of its modules, in float or as quantized so far, and see what goes in and out there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pennyweight.errors import EmptyCalibration
from pennyweight.graph.record import call
from pennyweight.nn.fake import ActivationQuantizer
from pennyweight.nn.sites import aside
from pennyweight.stats.moments import Moments

Seen = Callable[[tuple[Any, ...], dict[str, Any]], None]


class ReachedError(Exception):
    """The module was reached; what follows need not run."""


def visit(
    model: nn.Module, batches: Iterable[Any], module: nn.Module, see: Seen, *, once: bool = True
) -> int:
    """Show the arguments of every call of `module` to `see`; returns the number of batches.

    With `once` a batch is given up after the first call. Gradients are off.
    """

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        with aside():
            see(args, kwargs)
        if once:
            raise ReachedError

    count = 0
    handle = module.register_forward_pre_hook(before, with_kwargs=True)
    try:
        with torch.no_grad():
            for batch in batches:
                count += 1
                try:
                    call(model, batch)
                except ReachedError:
                    continue
    finally:
        handle.remove()
    return count


def output_moments(
    model: nn.Module, batches: Iterable[Any], modules: Mapping[str, nn.Module], *, stop: bool = False
) -> dict[str, Moments]:
    """Mean and variance of every output channel over batches and places, by name.

    Channels are on axis 1 of the results of convolutions and batch norms, and on the last of others. With `stop` a
    batch is given up behind the first module that is reached.

    Raises:
        EmptyCalibration: if a module is never reached.
    """
    seen: dict[str, Moments] = {}
    handles = []
    for name, module in modules.items():

        def after(m: nn.Module, args: Any, result: Tensor, name: str = name) -> None:
            axis = _channel_axis(m, result)
            with aside():
                seen.setdefault(name, Moments()).update(result.detach().movedim(axis, -1).flatten(0, -2))
            if stop:
                raise ReachedError

        handles.append(module.register_forward_hook(after))
    try:
        with torch.no_grad():
            for batch in batches:
                try:
                    call(model, batch)
                except ReachedError:
                    continue
    finally:
        for handle in handles:
            handle.remove()
    missing = [name for name in modules if name not in seen]
    if missing:
        raise EmptyCalibration(
            "no batch reaches this layer", site=missing[0], hint="Pass some hundred inputs."
        )
    return seen


def _channel_axis(module: nn.Module, result: Tensor) -> int:
    """Batches or not, a convolution has its places behind the channels."""
    layer = vars(module).get("inner", module)  # of one that is kept in 16 bits
    return 1 if isinstance(layer, _BatchNorm) else result.ndim - 1 - len(getattr(layer, "kernel_size", ()))


def mean_outputs(
    model: nn.Module, batches: Iterable[Any], modules: Mapping[str, nn.Module], *, stop: bool = False
) -> dict[str, Tensor]:
    """The means of `output_moments`, float64 [channels] by name."""
    return {name: seen.mean for name, seen in output_moments(model, batches, modules, stop=stop).items()}


@contextmanager
def floating(model: nn.Module) -> Iterator[None]:
    """Within, a prepared model computes in float: nothing is rounded, no solved weight or shifted bias is used."""
    quantizers = [(m, m.active) for m in model.modules() if isinstance(m, ActivationQuantizer)]
    solved = [(m, m.solved) for m in model.modules() if isinstance(getattr(m, "solved", None), dict)]
    shifts = [(m, m.bias_shift) for m, _ in solved if getattr(m, "bias_shift", None) is not None]
    try:
        for quantizer, _ in quantizers:
            quantizer.active = False
        for twin, _ in solved:
            twin.solved = {}  # type: ignore[assignment]
        for twin, _ in shifts:
            twin.bias_shift = None  # type: ignore[assignment]
        yield
    finally:
        for quantizer, active in quantizers:
            quantizer.active = active
        for twin, codes in solved:
            twin.solved = codes
        for twin, shift in shifts:
            twin.bias_shift = shift

"""Targets that add two products of bytes in 16 bits, and saturate: x86 without VNNI, by `pmaddubsw`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from pennyweight.diagnose.finding import Case, Finding, causes
from pennyweight.diagnose.simulate import Matrix, Range, Simulation

TOP, BOTTOM = 32767, -32768
ROWS = 1 << 22  # pairs that are held at once


def bound(codes: Tensor, high: int) -> int:
    """The greatest sum of two neighbouring products that any input can make, `high * max |w0 + w1|` by sign."""
    pairs = F.pad(codes.to(torch.int32), (0, codes.shape[1] % 2)).reshape(len(codes), -1, 2)
    positive = pairs.clamp(min=0).sum(-1).max()
    negative = (-pairs.clamp(max=0)).sum(-1).max()
    return int(high * torch.maximum(positive, negative))


def saturation(x: Tensor, codes: Tensor) -> Tensor:
    """What saturating sums of neighbours take: `sum_j clamp(p_j) - p_j`, p_j sums of two products.

    Shapes: x [n, k] codes from 0; codes [out, k]; result [n, out].
    """
    odd = codes.shape[1] % 2
    x, codes = F.pad(x.float(), (0, odd)), F.pad(codes.float(), (0, odd))
    even_x, odd_x, even_w, odd_w = x[:, ::2], x[:, 1::2], codes[:, ::2], codes[:, 1::2]
    out = x.new_zeros(len(x), len(codes))
    step = max(1, ROWS // max(1, even_x.numel()))
    for start in range(0, len(codes), step):
        rows = slice(start, start + step)
        p = even_x[:, None] * even_w[rows] + odd_x[:, None] * odd_w[rows]
        out[:, rows] = (p.clamp(BOTTOM, TOP) - p).sum(-1)
    return out


def _lost(module: Any, x: Tensor, found: Range, weight: Matrix) -> Tensor | None:
    """What saturation adds to a layer's float output; None for layers other than Linear and 2-d convolutions."""
    assert weight.codes is not None
    q = (torch.round(x / found.scale) + found.zero).clamp(0, found.high)
    unit = found.scale * weight.scale.reshape(-1)
    if isinstance(module, nn.Linear):
        taken = saturation(q.reshape(-1, q.shape[-1]), weight.codes)
        return (taken * unit).reshape(*x.shape[:-1], -1)
    if not isinstance(module, nn.Conv2d) or isinstance(module.padding, str) or module.padding_mode != "zeros":
        return None
    pad = [module.padding[1]] * 2 + [module.padding[0]] * 2
    q = F.pad(q, pad, value=found.zero)
    columns = F.unfold(q, module.kernel_size, module.dilation, 0, module.stride)
    n, _, places = columns.shape
    groups, rows = module.groups, len(weight.codes) // module.groups
    columns = columns.reshape(n, groups, -1, places)
    parts = []
    for g in range(groups):
        flat = columns[:, g].transpose(1, 2).reshape(n * places, -1)
        parts.append(saturation(flat, weight.codes[g * rows : (g + 1) * rows]).reshape(n, places, rows))
    taken = torch.cat(parts, -1) * unit
    height = (q.shape[2] - module.dilation[0] * (module.kernel_size[0] - 1) - 1) // module.stride[0] + 1
    return taken.transpose(1, 2).reshape(n, -1, height, places // height)


def exposed(simulation: Simulation) -> list[str]:
    """Layers in which some input could saturate a sum of two products."""
    found = []
    for name, weight in simulation.weights.items():
        now = simulation.ranges.get(f"{name}:input")
        if not isinstance(weight, Matrix) or weight.codes is None or now is None:
            continue
        if bound(weight.codes, now.high) > TOP:
            found.append(name)
    return found


@contextmanager
def saturating(simulation: Simulation, layers: list[str]) -> Iterator[None]:
    """Products of these layers saturate, for a while."""

    def hook(name: str) -> Any:
        def after(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            weight, now = simulation.weights[name], simulation.ranges[f"{name}:input"]
            if (
                not isinstance(weight, Matrix)
                or weight.codes is None
                or "weight" not in simulation.twins[name].solved
            ):
                return output
            with torch._C.DisableTorchFunction():  # what is computed here is none of the model's own calls
                lost = _lost(module, args[0], now, weight)
                return output if lost is None else output + lost

        return after

    handles = [
        simulation.twins[name].register_forward_hook(hook(name))
        for name in layers
        if isinstance(simulation.twins[name], nn.Linear | _ConvNd)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@causes.register("overflow without VNNI")
def overflow(case: Case) -> list[Finding]:
    """On targets without VNNI: sums of two products that leave 16 bits on the batches at hand."""
    if case.target != "no-vnni":
        return []
    simulation, found = case.simulation, []
    clean = simulation.simulated.sqnr_db
    for name in exposed(simulation):
        with saturating(simulation, [name]):
            hurt = simulation.damage().sqnr_db
        if clean - hurt < 0.5:
            continue
        weight = simulation.weights[name]
        assert isinstance(weight, Matrix)
        assert weight.codes is not None
        worst = bound(weight.codes, simulation.ranges[f"{name}:input"].high)
        found.append(
            Finding(
                "overflow without VNNI", f"{name}:weight",
                f"sums of two products reach {worst:,}, 16 bits end at {TOP:,}: on a target without VNNI the output "
                f"falls from {clean:.1f} to {hurt:.1f} dB",
                "Give this layer's weights 7 bits (int7 range), or run it on an engine that widens, as ours does.",
                _seven_bits(name), severity=clean - hurt,
            )
        )  # fmt: skip
    return found


def _seven_bits(name: str) -> Callable[[Simulation], float]:
    def trial(simulation: Simulation) -> float:
        """The output on that target with codes of half the size."""
        weight = simulation.weights[name]
        assert isinstance(weight, Matrix)
        scale = weight.scale.reshape(-1, 1) * 2
        codes = torch.round(simulation.matrices[name] / scale).clamp(-64, 63)
        half = Matrix(codes * scale, codes.to(torch.int8), scale.reshape(-1))
        with simulation.changed(weights={name: half}), saturating(simulation, exposed(simulation)):
            return simulation.damage().sqnr_db

    return trial

"""A converted model beside its float original, taken apart: every weight and range can be switched and changed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pennyweight.errors import InputError
from pennyweight.formats import grids
from pennyweight.formats.integer import Integer
from pennyweight.graph.record import call
from pennyweight.nn.calls import IntegerCall
from pennyweight.nn.fake import ActivationQuantizer
from pennyweight.nn.integer import IntegerWeight, unpack_nibbles
from pennyweight.nn.packing import weight_codes
from pennyweight.passes.calibrate import quantizers
from pennyweight.passes.solve import weights
from pennyweight.passes.train import Train
from pennyweight.pipeline import prepare, state
from pennyweight.plan import LayerPlan
from pennyweight.qtensor import QParams
from pennyweight.recipe import Recipe
from pennyweight.tune.probe import Damage, compared

KEPT = 4096  # values of a site and batch that quantiles are taken from


class Decoded(Protocol):
    """What a twin expects where its weight is solved."""

    def dequantize(self) -> Tensor:
        """[out, in] float32."""
        ...


@dataclass(frozen=True)
class Matrix:
    """A weight as it is decoded, with what made it.

    Attributes:
        values: float32 [out, in].
        codes: int8 [out, in]; None where there are groups or zero points.
        scale: float32 [out] or [1].
    """

    values: Tensor
    codes: Tensor | None
    scale: Tensor

    def dequantize(self) -> Tensor:
        """[out, in] float32."""
        return self.values


@dataclass(frozen=True)
class Range:
    """Scale and zero point of a site, on codes from 0 to `high`."""

    scale: float
    zero: float
    high: int

    @property
    def lo(self) -> float:
        """The least value with a code of its own."""
        return -self.zero * self.scale

    @property
    def hi(self) -> float:
        """The greatest."""
        return (self.high - self.zero) * self.scale

    @classmethod
    def of(cls, lo: float, hi: float, high: int) -> Range:
        """The range that holds zero and both ends."""
        lo, hi = min(lo, 0.0), max(hi, 0.0)
        scale = (hi - lo) / high or 1.0
        return cls(scale, float(round(-lo / scale)), high)


@dataclass
class Seen:
    """What the float model has at a site, on all batches.

    Attributes:
        lo, hi: extremes.
        values: a sample.
        channels: greatest magnitude of every channel.
        clipped: part of the values beyond the range; energy: of their squares, the part that clipping takes.
        noise: `mean (x - x')^2 / mean x^2`, of rounding and clipping.
        count: values.
    """

    lo: float = float("inf")
    hi: float = float("-inf")
    values: list[Tensor] = field(default_factory=list)
    channels: Tensor | None = None
    clipped: float = 0.0
    energy: float = 0.0
    noise: float = 0.0
    count: int = 0

    def quantiles(self, q: Sequence[float]) -> list[float]:
        """Of the sample."""
        return torch.quantile(torch.cat(self.values), torch.tensor(q)).tolist()


class Simulation:
    """Twins of the float model with the numbers of the converted one.

    Attributes:
        plan, graph, recipe, journal: of the converted model.
        ranges: by site; weights: by layer; shifts: of biases, by layer. Change them within `changed`.
        seen: see `Seen`, by site.
        wanted: outputs of the float model by batch; actual: how far the converted model's are.
    """

    def __init__(self, float_model: nn.Module, quantized: nn.Module, batches: Sequence[Any]) -> None:
        if not batches:
            raise InputError("there is no batch to compare on", hint="Pass some inputs.")
        st = state(quantized)
        if st.stage != "converted":
            raise InputError(
                f"the model is {st.stage}, not converted", hint="Pass what pw.quantize returned."
            )
        self.float_model, self.quantized, self.batches = float_model, quantized, list(batches)
        self.plan, self.graph, self.recipe, self.journal = st.plan, st.graph, st.recipe, st.journal
        self.example = st.example if st.example is not None else batches[0]
        still = tuple(p for p in st.recipe.passes if not isinstance(p, Train))
        prepared = prepare(float_model, self.example, Recipe(st.recipe.name, st.recipe.rules, still))
        self.model = prepared
        self.converted: dict[str, nn.Module] = {}
        for module in getattr(quantized, "uncompiled", quantized).modules():
            layer = getattr(module, "layer", None)
            if isinstance(layer, LayerPlan):
                self.converted[layer.name] = module
        self.twins: dict[str, Any] = {}
        self.matrices: dict[str, Tensor] = {}
        for twin, name, matrix in weights(prepared, dict(prepared.named_parameters())):
            if name == "weight" and isinstance(self.converted.get(twin.layer.name), IntegerWeight):
                self.twins[twin.layer.name] = twin
                self.matrices[twin.layer.name] = matrix.float()
        self.sites: dict[str, ActivationQuantizer] = quantizers(prepared)
        self.ranges: dict[str, Range] = {}
        self.weights: dict[str, Decoded] = {}
        self.shifts: dict[str, Tensor | None] = {}
        self.float_layers: set[str] = set()
        self._read()
        self._set(False)
        self.wanted = self.outputs(float_model)
        self.seen = self._look()
        self.actual = compared(self.wanted, self.outputs(quantized))
        self._set(True)
        self.simulated = compared(self.wanted, self.outputs(self.model))

    # -- numbers of the converted model ---------------------------------------------------------------------------

    def _read(self) -> None:
        for name, module in self.converted.items():
            layer = self.plan.layers.get(name)
            if layer is None:
                continue
            if isinstance(module, IntegerWeight):
                if module.mode == "static":
                    site = str(layer.input_site(0))
                    self.ranges[site] = Range(float(module.x_scale), float(module.x_zero), module.x_high)
                found = decoded(module)
                if found is not None and name in self.twins:
                    self.weights[name] = found
                    self.shifts[name] = self._shift(name, module)
            elif isinstance(module, IntegerCall):
                for position in module.positions:
                    scale, zero = module.parameters_of(position)
                    site = str(layer.input_site(position))
                    self.ranges[site] = Range(float(scale), float(zero), module.highs[position])
        self.ranges = {site: r for site, r in self.ranges.items() if site in self.sites}

    def _shift(self, name: str, module: IntegerWeight) -> Tensor | None:
        """The converted bias, less the float one."""
        bias = real_bias(module)
        own = getattr(self.twins[name], "bias", None)
        if bias is None:
            return None if own is None else -own.detach().float()
        return bias if own is None else bias - own.detach().float()

    # -- switches -------------------------------------------------------------------------------------------------

    def layer_of(self, site: str) -> str:
        """The layer that reads at a site."""
        return next((n for n, la in self.plan.layers.items() if site in map(str, la.sites())), "")

    def _set(
        self, active: bool, only: str | None = None, *, weight: bool = True, inputs: bool = True
    ) -> None:
        """Everything on or off; or one layer on and the rest off."""
        for site, quantizer in self.sites.items():
            owner = self.layer_of(site)
            on = active and inputs and site in self.ranges and (only is None or owner == only)
            quantizer.active = on and owner not in self.float_layers
            if quantizer.active:
                found = self.ranges[site]
                grid = grids[quantizer.spec.grid]
                low = grid.qmin if isinstance(grid, Integer) else 0
                quantizer.set(QParams(torch.tensor(found.scale), torch.tensor(found.zero + low)))
        for name, twin in self.twins.items():
            on = active and weight and name in self.weights and (only is None or name == only)
            on = on and name not in self.float_layers
            twin.solved.pop("weight", None)
            if on:
                twin.solved["weight"] = self.weights[name]
            if hasattr(twin, "bias_shift"):
                twin.bias_shift = self.shifts.get(name) if on else None

    def outputs(self, model: nn.Module) -> list[Tensor]:
        """Float outputs of a model by batch, [rows, values]."""
        found = []
        with torch.no_grad():
            for batch in self.batches:
                leaves = [
                    t for t in tree_leaves(call(model, batch))
                    if isinstance(t, Tensor) and t.is_floating_point() and t.ndim and t.numel()
                ]  # fmt: skip
                if not leaves:
                    raise InputError("the model returns no float tensor to compare")
                found.append(leaves[0].float().reshape(-1, leaves[0].shape[-1]))
        return found

    def alone(self, layer: str, *, weight: bool = True, inputs: bool = True) -> Damage:
        """How far outputs are with one layer quantized, or a part of it."""
        self._set(True, layer, weight=weight, inputs=inputs)
        try:
            return compared(self.wanted, self.outputs(self.model))
        finally:
            self._set(True)

    def damage(self) -> Damage:
        """With everything as it now is."""
        self._set(True)
        return compared(self.wanted, self.outputs(self.model))

    @contextmanager
    def changed(
        self,
        *,
        ranges: Mapping[str, Range] | None = None,
        weights: Mapping[str, Decoded] | None = None,
        shifts: Mapping[str, Tensor | None] | None = None,
        floats: Sequence[str] = (),
    ) -> Iterator[Simulation]:
        """Other numbers, for a while."""
        before = dict(self.ranges), dict(self.weights), dict(self.shifts), set(self.float_layers)
        self.ranges |= ranges or {}
        self.weights |= weights or {}
        self.shifts |= shifts or {}
        self.float_layers |= set(floats)
        try:
            yield self
        finally:
            self.ranges, self.weights, self.shifts, self.float_layers = before
            self._set(True)

    # -- looking --------------------------------------------------------------------------------------------------

    def _look(self) -> dict[str, Seen]:
        """Statistics of every site in the float model."""
        seen = {site: Seen() for site in self.sites}
        handles = [
            quantizer.register_forward_pre_hook(self._watch(site, seen[site]))
            for site, quantizer in self.sites.items()
        ]
        try:
            self.outputs(self.model)
        finally:
            for handle in handles:
                handle.remove()
        return {site: found for site, found in seen.items() if found.count}

    def _watch(self, site: str, into: Seen) -> Any:
        quantizer, found = self.sites[site], self.ranges.get(site)

        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0].detach().float()
            if not x.numel():
                return
            into.lo, into.hi = min(into.lo, float(x.min())), max(into.hi, float(x.max()))
            flat = x.reshape(-1)
            if flat.numel() > KEPT:  # drawn: even steps would fall into step with rows and channels
                generator = torch.Generator().manual_seed(into.count)
                flat = flat[torch.randint(flat.numel(), (KEPT,), generator=generator)]
            into.values.append(flat.clone())
            axis = quantizer.axis if quantizer.axis is not None else (1 if x.ndim == 4 else -1)
            if x.ndim > 1:
                greatest = x.abs().movedim(axis, -1).reshape(-1, x.shape[axis]).amax(0)
                if into.channels is None or into.channels.shape == greatest.shape:
                    into.channels = (
                        greatest if into.channels is None else torch.maximum(into.channels, greatest)
                    )
            if found is not None:
                inside = x.clamp(found.lo, found.hi)
                signal = float((x.double() ** 2).sum()) or 1.0
                rounded = (torch.round(inside / found.scale + found.zero) - found.zero) * found.scale
                part = x.numel() / (into.count + x.numel())
                margin = 0.5 * found.scale  # what rounds to the last code is not clipped
                out = float(((x < found.lo - margin) | (x > found.hi + margin)).double().mean())
                into.clipped += part * (out - into.clipped)
                into.energy += part * (float(((x - inside).double() ** 2).sum()) / signal - into.energy)
                into.noise += part * (float(((x - rounded).double() ** 2).sum()) / signal - into.noise)
            into.count += x.numel()

        return hook


def decoded(module: IntegerWeight) -> Matrix | None:
    """The weight of a converted layer; None for products of signs."""
    rows, columns = module.out_features, module.in_features
    if module.mode == "binary":
        return None
    codes = unpack_nibbles(module.codes, columns) if module.bits == 4 else module.codes
    if module.table is not None:
        codes = weight_codes(codes, module.table, columns)
    scale = module.scale.float()
    if scale.ndim == 1:
        return Matrix(codes.float() * scale.reshape(-1, 1), codes, scale)
    blocks = codes.float().reshape(rows, scale.shape[1], -1)
    zero = 0.0 if module.zero is None else module.zero.reshape(len(scale), -1, 1)
    values = ((blocks - zero) * scale.reshape(len(scale), -1, 1)).reshape(rows, columns)
    return Matrix(values, None, scale)


def real_bias(module: IntegerWeight) -> Tensor | None:
    """The bias of a converted layer as real numbers."""
    if module.bias is None or module.bias.is_floating_point():
        return None if module.bias is None else module.bias.detach().float()
    return (module.bias.double() * module.x_scale.double() * module.scale.double().reshape(-1)).float()

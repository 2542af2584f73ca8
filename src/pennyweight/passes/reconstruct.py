"""Learn the rounding of weights, layer by layer or block by block, so that results are those of the float network."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from pennyweight.atomic import atomic_write
from pennyweight.errors import RecipeError
from pennyweight.nn.fake import ActivationQuantizer
from pennyweight.passes import Context, Stage, passes
from pennyweight.passes.calibrate import quantizers
from pennyweight.passes.solve import Solve, weights
from pennyweight.progress import track
from pennyweight.qtensor import QTensor
from pennyweight.reconstruction.blocks import Unit, find_units
from pennyweight.reconstruction.capture import floating
from pennyweight.reconstruction.optimize import Block, Rounding, Settings, reconstruct
from pennyweight.reconstruction.replay import Replay
from pennyweight.reconstruction.results import first_batches
from pennyweight.reconstruction.samples import first_tensor, fisher, inputs_of

Start = Literal["nearest", "solved"]
Units = Literal["layer", "block", "network"]
CHOICES = {"start": get_args(Start), "units": get_args(Units), "rounding": get_args(Rounding)}


@passes.register("reconstruct")
@dataclass(frozen=True)
class Reconstruct:
    """Round to nearest, then learn for every unit, in the order they run, to which level each weight is rounded.

        min_V  E |f(W, x) - f(W'(V), x')|^2 + pressure * mean(1 - |2 h(V) - 1|^beta)

    with x' the unit's inputs in the network as quantized so far, and f(W, x) its results in the float network. The
    error is measured in units of that of nearest rounding, so that nothing has to be tuned to a network. `adaround`,
    `brecq`, `qdrop` and `adaquant` are this pass with the settings of these papers. A unit is reported by a
    `reconstruct` event with its error before and after; what does not lower it is taken back.

    Args:
        range: rule for the scales of weights; they stay as they are, unless `rounding` is "free".
        options: its options.
        start: "nearest", or "solved": from what the passes before have found, such as GPTQ's codes and measured biases.
        units: "layer", or "block": residual blocks and the like, as `reconstruction.blocks` finds them; or "network":
            everything at once, by the network's result.
        iterations: steps a unit.
        batch: samples a step.
        rate: of Adam; 0 stands for 10 / iterations, with "free" for 3 / iterations (0.75 from what is solved), falling
            to 0.
        pressure: see above.
        warmup: share of the steps without pressure.
        fisher: weigh errors by the squared gradients of the float network's log likelihood.
        drop: share of activations that stay unrounded while learning, anew in every step.
        steps: learn the scales of activations too.
        biases: learn a shift of every bias too.
        rounding: "soft" for sigmoids, "signs" for signed gradients, "free" for any level under learned scales.
        skip: paths of layers to leave as they are.

    Source: Nagel et al. 2020, AdaRound (arXiv:2004.10568); Li et al. 2021, BRECQ (arXiv:2102.05426); Wei et al. 2022,
    QDrop (arXiv:2203.05740); Cheng et al. 2023, SignRound (arXiv:2309.05516); Hubara et al. 2021, AdaQuant
    (arXiv:2006.10518).
    """

    range: str = "mse"
    options: dict[str, Any] = field(default_factory=dict)
    start: Start = "nearest"
    units: Units = "layer"
    iterations: int = 1000
    batch: int = 32
    rate: float = 0.0
    pressure: float = 1.0
    warmup: float = 0.2
    fisher: bool = False
    drop: float = 0.0
    steps: bool = False
    biases: bool = True
    rounding: Rounding = "soft"
    skip: tuple[str, ...] = ()
    stage: ClassVar[Stage] = "solve"
    preserves_output: ClassVar[bool] = False
    replays: ClassVar[bool] = True

    def needs(self) -> set[str]:
        """Nothing.

        Raises:
            RecipeError: on options that have no meaning.
        """
        known = {"start": self.start, "units": self.units, "rounding": self.rounding}
        for name, able in CHOICES.items():
            if known[name] not in able:
                raise RecipeError(f"{name} = {known[name]!r}", hint=f"One of {', '.join(able)}.")
        if self.iterations < 1 or self.batch < 1 or not 0 <= self.drop < 1:
            raise RecipeError(f"iterations = {self.iterations}, batch = {self.batch}, drop = {self.drop}")
        return set()

    def settings(self) -> Settings:
        """What the loop reads."""
        free = 3.0 if self.start == "nearest" else 0.75  # larger steps lose what was solved before they gain
        whole = {"signs": 2.0, "free": free}.get(self.rounding, 10.0) / self.iterations
        return Settings(
            self.iterations, self.batch, self.rate or whole, self.pressure, self.warmup, self.drop, self.steps,
            self.biases, self.rounding,
        )  # fmt: skip

    def run(self, context: Context) -> None:
        """Solve every weight, then every unit.

        Raises:
            EmptyCalibration: if there is no batch.
        """
        if self.start == "nearest":
            Solve("rtn", self.range, self.options).run(context)
        for quantizer in quantizers(context.model).values():
            quantizer.active = quantizer.calibrated
        name = type(self).__name__.lower()
        model, batches = context.model, first_batches(context.batches, name)
        found = weights(model, dict(model.named_parameters()))
        by_layer = {t.layer.name: [f for f in found if f[0] is t] for t, _, _ in found}
        paths = {p for p in by_layer if ":" not in p and p not in self.skip}
        units = self._units(context, paths)
        store = (
            None if context.checkpoint is None else _Store(context.checkpoint, self._digest(context, batches))
        )
        total = len(units) * self.iterations
        bar = iter(track(range(total), name, show=context.progress))
        replay = Replay(model, context.graph, lambda: batches)
        floats = Replay(model, context.graph, lambda: batches)
        for place, unit in enumerate(units):
            errors = store.read(place, unit, model, by_layer) if store is not None else None
            if errors is None:
                block = self._block(context, unit, by_layer, (replay, floats), place)
                errors = reconstruct(
                    block, self.settings(), context.seed * 1000 + place, lambda: next(bar, 0)
                )
                replay.finish(unit.path)
                if store is not None:
                    store.write(place, unit, model, by_layer, errors)
            context.journal.add(
                "reconstruct", unit.path, layers=len(unit.layers), before=errors[0], after=errors[1]
            )

    def _units(self, context: Context, paths: set[str]) -> list[Unit]:
        found = find_units(context.graph, context.model, paths, whole_blocks=self.units == "block")
        if self.units == "network" and found:
            return [Unit("", tuple(p for unit in found for p in unit.layers))]
        return found

    def _block(
        self,
        context: Context,
        unit: Unit,
        by_layer: dict[str, list[tuple[Any, str, Tensor]]],
        replays: tuple[Replay, Replay],
        place: int,
    ) -> Block:
        model = context.model
        module = model.get_submodule(unit.path)
        quantized, floats = replays
        with quantized.running():
            samples = inputs_of(model, quantized.batches(), module)
        mixed = None
        importance: Any = None
        with floating(model):
            with floats.running():
                if self.drop:
                    mixed = inputs_of(model, floats.batches(), module)
                if self.fisher:
                    importance = fisher(model, floats.batches(), module, context.seed * 1000 + place)
            target = [first_tensor(result) for result in floats.finish(unit.path)]
        ragged = samples.ragged
        own = [item for p in unit.layers for item in by_layer[p]]
        return Block(
            unit, module, own, samples, target if ragged else torch.cat(target), mixed,
            importance if importance is None or ragged else torch.cat(importance),
            self._ties(context, module) if self.steps else (),
        )  # fmt: skip

    def _ties(self, context: Context, module: nn.Module) -> tuple[tuple[ActivationQuantizer, ...], ...]:
        """Quantizers of a module by shared scale, with those elsewhere that share it; none that were learned before."""
        every = quantizers(context.model)
        groups = {str(s): [str(t) for t in group] for group in context.plan.ties for s in group}
        mine = {q.site for q in module.modules() if isinstance(q, ActivationQuantizer) and q.calibrated}
        seen: dict[int, tuple[ActivationQuantizer, ...]] = {}
        order = {layer: i for i, layer in enumerate(n.name for n in context.graph)}
        first = min((order.get(_layer(s), 0) for s in mine), default=0)
        for site in sorted(mine):
            group = tuple(every[s] for s in groups.get(site, [site]) if s in every)
            if all(order.get(_layer(q.site), 0) >= first for q in group):
                seen.setdefault(min(id(q) for q in group), group)
        return tuple(seen.values())

    def _digest(self, context: Context, batches: Iterable[Any]) -> str:
        """Of all that the outcome depends on."""
        options = json.dumps([type(self).__name__, asdict(self), context.seed], sort_keys=True, default=str)
        digest = hashlib.sha256(options.encode())
        tensors = [t for _, t in sorted(context.model.state_dict().items()) if isinstance(t, Tensor)]
        for batch in batches:
            tensors += [x for x in torch.utils._pytree.tree_leaves(batch) if isinstance(x, Tensor)]
        for tensor in tensors:
            digest.update(str((tuple(tensor.shape), tensor.dtype)).encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() if tensor.ndim else
                          str(float(tensor)).encode())  # fmt: skip
        return digest.hexdigest()


def _layer(site: str) -> str:
    """The layer that a site belongs to: a module's path, or `path:op/index`."""
    path, _, tensor = site.partition(":")
    return f"{path}:{tensor.partition(':')[0]}" if "/" in tensor else path


def _stored(scale: Tensor | QTensor) -> Tensor:
    return scale.codes if isinstance(scale, QTensor) else scale


@dataclass(frozen=True)
class _Store:
    """What was learned, a file a unit, in a folder of the digest's name."""

    folder: Path
    digest: str

    def _path(self, place: int) -> Path:
        return self.folder / f"reconstruct-{self.digest[:16]}" / f"{place:04}.safetensors"

    def _tensors(
        self, unit: Unit, model: nn.Module, by_layer: dict[str, list[tuple[Any, str, Tensor]]]
    ) -> Iterator[tuple[str, Tensor]]:
        for path in unit.layers:
            for twin, name, _ in by_layer[path]:
                yield f"codes {path}:{name}", twin.solved[name].codes
                yield f"step {path}:{name}", _stored(twin.solved[name].scale)
                if getattr(twin, "bias_shift", None) is not None:
                    yield f"shift {path}", twin.bias_shift
        for site, quantizer in quantizers(model).items():
            yield f"scale {site}", quantizer.scale

    def write(
        self,
        place: int,
        unit: Unit,
        model: nn.Module,
        by_layer: dict[str, list[tuple[Any, str, Tensor]]],
        errors: tuple[float, float],
    ) -> None:
        """Keep a unit."""
        path = self._path(place)
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {n: t.detach().contiguous().clone() for n, t in self._tensors(unit, model, by_layer)}
        tensors["errors"] = torch.tensor(errors, dtype=torch.float64)
        with atomic_write(path) as file:
            file.write(save(tensors, {"unit": unit.path, "digest": self.digest}))

    def read(
        self, place: int, unit: Unit, model: nn.Module, by_layer: dict[str, list[tuple[Any, str, Tensor]]]
    ) -> tuple[float, float] | None:
        """Put back a unit that was kept; its errors, or None if there is no such file."""
        path = self._path(place)
        if not path.is_file():
            return None
        tensors = load_file(path)
        for layer in unit.layers:
            for twin, name, _ in by_layer[layer]:
                old: QTensor = twin.solved[name]
                codes, step = tensors[f"codes {layer}:{name}"], tensors[f"step {layer}:{name}"]
                scale = replace(old.scale, codes=step) if isinstance(old.scale, QTensor) else step
                twin.solved = {**twin.solved, name: QTensor(codes, scale, old.zero, old.spec)}
                if f"shift {layer}" in tensors:
                    twin.bias_shift = tensors[f"shift {layer}"]
        for site, quantizer in quantizers(model).items():
            quantizer.scale = tensors[f"scale {site}"]
        before, after = tensors["errors"].tolist()
        return before, after

"""A calibrated model whose layers take any format at once, without calibrating again."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pennyweight.errors import EmptyCalibration
from pennyweight.graph import ops
from pennyweight.graph.record import call
from pennyweight.journal import Journal
from pennyweight.nn.fake import ActivationQuantizer
from pennyweight.passes import Context, Stage
from pennyweight.passes.calibrate import quantizers
from pennyweight.passes.correct_bias import Corrigible
from pennyweight.passes.solve import weights
from pennyweight.pipeline import calibrate, prepare, state
from pennyweight.plan import LayerPlan, Plan
from pennyweight.qtensor import QParams, QTensor
from pennyweight.ranges.mse import MSE
from pennyweight.recipe import Recipe
from pennyweight.solvers.rtn import rtn
from pennyweight.spec import QuantSpec
from pennyweight.stats.moments import Moments
from pennyweight.tune.formats import layer_formats

WEIGHTS = MSE(steps=24, shrink=0.6)  # of weights in formats that the recipe does not give
ACTIVATIONS = MSE(steps=40, shrink=0.3)


@dataclass(frozen=True)
class Survey:
    """A last pass: keeps ranges of the activations in every format, and the means of the inputs.

    Attributes:
        specs: of activations.
        ranges: scale and zero point by site and spec, filled when it runs.
        means: of every input channel, by layer.
    """

    specs: tuple[QuantSpec, ...]
    ranges: dict[tuple[str, str], QParams] = field(default_factory=dict)
    means: dict[str, Tensor] = field(default_factory=dict)
    stage: ClassVar[Stage] = "solve"
    preserves_output: ClassVar[bool] = True

    def needs(self) -> set[str]:
        """Histograms and moments."""
        return {"histogram", "moments"}

    def run(self, context: Context) -> None:
        """Read the statistics before they are dropped."""
        found = quantizers(context.model)
        leader = {str(s): str(group[0]) for group in context.plan.ties for s in group}
        for site in found:
            seen = found[leader.get(site, site)].statistics.get("histogram")
            for spec in self.specs if seen is not None and seen.count else ():
                self.ranges[site, str(spec)] = ACTIVATIONS(seen, spec)  # type: ignore[arg-type]
        for twin, _, _ in weights(context.model, dict(context.model.named_parameters())):
            quantizer = getattr(twin, "input", None)
            seen = quantizer.statistics.get("moments") if isinstance(quantizer, ActivationQuantizer) else None
            if isinstance(seen, Moments) and seen.rows:
                self.means[twin.layer.name] = seen.mean


class Halved:
    """A weight rounded to bf16, where a twin expects codes."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix.detach().bfloat16().float()

    def dequantize(self) -> Tensor:
        """[out, in] float32."""
        return self.matrix


@dataclass
class Solved:
    """A weight in a format, with the shift of the bias that belongs to it."""

    weight: QTensor | Halved
    shift: Tensor | None


class Probe:
    """Every layer in float at first; `set` gives one a format, its weight or its activations alone if asked for.

    Activations of 8 bits keep the ranges of the recipe, other widths the least squared error of the same statistics;
    weights of 8 bits are as the recipe solves them, others rounded to the nearest with searched scales, and biases
    corrected for the means of the inputs wherever the recipe corrects them.

    Args:
        model: a float model; left untouched.
        batches: calibration data; a list of batches.
        formats: names of layer formats that will be asked for.
        recipe: what "int8" means.
        samples: of the data, to compare outputs on.
        seed: of everything random.

    Attributes:
        layers: names of what can be set: layers with weights and products of activations.
        between: names of sums, pools and tables, which have one format.
    """

    def __init__(
        self, model: nn.Module, batches: Sequence[Any], formats: Iterable[str], recipe: Recipe, *,
        samples: int = 64, seed: int = 0, journal: Journal | None = None,
    ) -> None:  # fmt: skip
        if not batches:
            raise EmptyCalibration("there is no batch to measure on", hint="Pass some hundred inputs.")
        self.formats = tuple(formats)
        inputs = [f.input_spec for f in map(layer_formats.__getitem__, self.formats) if f.input < 8]
        self.survey = Survey(tuple(dict.fromkeys(s for s in inputs if s is not None)))
        with_survey = Recipe(recipe.name, recipe.rules, (*recipe.passes, self.survey))
        prepared = prepare(model, batches[0], with_survey, seed=seed, journal=journal)
        self.model = calibrate(prepared, batches, progress=False)
        self.plan: Plan = state(self.model).plan
        self.graph = state(self.model).graph
        self.batches = first_samples(batches, samples)
        self._twins: dict[str, Any] = {}
        self._quantizers: dict[str, list[ActivationQuantizer]] = {}
        for module in self.model.modules():
            layer = getattr(module, "layer", None)
            if isinstance(layer, LayerPlan) and self.plan.layers.get(layer.name) is layer:
                self._twins[layer.name] = module
        for site, quantizer in quantizers(self.model).items():
            owner = next((n for n, layer in self.plan.layers.items() if site in map(str, layer.sites())), "")
            self._quantizers.setdefault(owner, []).append(quantizer)
            quantizer.register_forward_pre_hook(_narrowing)
        self._calibrated = {
            q.site: (q.spec, QParams(q.scale.clone(), q.zero.clone()))
            for found in self._quantizers.values() for q in found
        }  # fmt: skip
        self.matrices: dict[str, dict[str, Tensor]] = {}
        for twin, name, matrix in weights(self.model, dict(self.model.named_parameters())):
            self.matrices.setdefault(twin.layer.name, {})[name] = matrix
        self._base: dict[tuple[str, str], Solved] = {
            (layer, name): Solved(self._twins[layer].solved[name], getattr(self._twins[layer], "bias_shift", None))
            for layer, named in self.matrices.items() for name in named
        }  # fmt: skip
        self._solved: dict[tuple[str, str, str], Solved] = {}
        settable = [n for n in self._twins if n in self.matrices or not _is_between(self.plan.layers[n].kind)]
        self.layers = [n for n in self.plan.layers if n in settable]
        self.between = [n for n in self.plan.layers if n in self._twins and n not in settable]
        for name in [*self.layers, *self.between]:
            self.set(name, None)
        self.reference = self.outputs()

    # -- formats --------------------------------------------------------------------------------------------------

    def choices(self, layer: str) -> list[str]:
        """Names of the formats that a layer can have, of those asked for."""
        kind, named = self.plan.layers[layer].kind, self.matrices.get(layer, {})
        found = []
        for name in self.formats:
            form = layer_formats[name]
            if form.base or form.keep == "float32":
                found.append(name)
            elif form.keep:  # bf16 is stored under the one name of a weight
                if kind not in RANGED and (list(named) == ["weight"] or not named) and kind not in STORED:
                    found.append(name)
            elif named and kind not in RANGED | STORED and list(named) == ["weight"]:
                found.append(name)
        return found

    def quantizers_of(self, layer: str) -> list[ActivationQuantizer]:
        """Of what a layer reads."""
        return self._quantizers.get(layer, [])

    def set(self, layer: str, form: str | None, *, weight: bool = True, activations: bool = True) -> None:
        """Give a layer a format, all of it or a part; None and "float32" leave it in float."""
        twin = self._twins[layer]
        chosen = None if form is None else layer_formats[form]
        for quantizer in self._quantizers.get(layer, ()):
            _set_quantizer(quantizer, chosen if activations else None, self._calibrated, self.survey)
        for name in self.matrices.get(layer, ()):
            solved = self.solved(layer, name, form) if weight and form is not None else None
            if solved is None:
                twin.solved.pop(name, None)
            else:
                twin.solved[name] = solved.weight
            if hasattr(twin, "bias_shift"):
                twin.bias_shift = None if solved is None else solved.shift

    def assign(self, formats: dict[str, str]) -> None:
        """Give every layer its format; what lies between integer layers is rounded too, unless all are float."""
        for layer in self.layers:
            self.set(layer, formats.get(layer))
        busy = any(layer_formats[f].integer for f in formats.values())
        for name in self.between:
            self.set(name, "int8" if busy else None)

    def solved(self, layer: str, name: str, form: str) -> Solved | None:
        """The weight in a format; None in float."""
        chosen = layer_formats[form]
        if chosen.keep == "float32":
            return None
        if chosen.base:
            return self._base[layer, name]
        key = (layer, name, form)
        if key not in self._solved:
            matrix = self.matrices[layer][name].float()
            if chosen.keep:
                self._solved[key] = Solved(Halved(matrix), None)
            else:
                spec = chosen.weight_spec
                assert spec is not None
                q = rtn(matrix, spec, WEIGHTS)
                self._solved[key] = Solved(q, self._shift(layer, matrix, q))
        return self._solved[key]

    def _shift(self, layer: str, matrix: Tensor, q: QTensor) -> Tensor | None:
        twin = self._twins[layer]
        means = self.survey.means.get(layer)
        if self._base[layer, "weight"].shift is None or means is None or not isinstance(twin, Corrigible):
            return None
        return twin.expected((matrix - q.dequantize()).double(), means).float()

    # -- running --------------------------------------------------------------------------------------------------

    def outputs(self) -> list[Tensor]:
        """Float outputs on the probed samples: for each batch, [rows, values]."""
        found = []
        with torch.no_grad():
            for batch in self.batches:
                leaves = [t for t in tree_leaves(call(self.model, batch)) if _counts(t)]
                found.append(torch.cat([t.float().reshape(-1, t.shape[-1]) for t in leaves[:1]]))
        return found

    def damage(self) -> Damage:
        """How far the outputs are from float's."""
        return compared(self.reference, self.outputs())


RANGED = frozenset({"LSTM", "GRU", "LSTMCell", "GRUCell", "MultiheadAttention"})
STORED = frozenset({"Embedding", "EmbeddingBag"})


def _is_between(kind: str) -> bool:
    return kind not in ops.MATMULS | ops.ATTENTION


def _counts(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point() and x.ndim > 0 and x.numel() > 0


def _narrowing(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    if not getattr(module, "narrow", False):
        return None
    return (args[0].bfloat16().float(), *args[1:])


def _set_quantizer(
    quantizer: ActivationQuantizer,
    form: Any,
    calibrated: dict[str, tuple[QuantSpec, QParams]],
    survey: Survey,
) -> None:
    """Off, narrowed to bf16, or rounding on the grid of a format."""
    vars(quantizer)["narrow"] = form is not None and form.keep == "bfloat16"
    quantizer.active = form is not None and form.integer
    if not quantizer.active:
        return
    quantizer.spec, params = calibrated[quantizer.site]
    wanted = form.input_spec
    if not form.base and wanted is not None and form.input != 8:
        params = survey.ranges.get((quantizer.site, str(wanted)), params)
        quantizer.spec = wanted
    quantizer.set(params)


def first_samples(batches: Sequence[Any], samples: int) -> list[Any]:
    """The first batches, cut so that there are `samples` rows in all; arguments without a common first axis stay."""
    kept, seen = [], 0
    for batch in batches:
        rows = {len(t) for t in tree_leaves(batch) if isinstance(t, Tensor) and t.ndim}
        if len(rows) != 1:
            kept.append(batch)
            seen += max(rows, default=1)
        else:
            take = min(rows.pop(), samples - seen)
            kept.append(
                torch.utils._pytree.tree_map(
                    lambda x, n=take: x[:n] if isinstance(x, Tensor) and x.ndim else x, batch
                )
            )
            seen += take
        if seen >= samples:
            break
    return kept


@dataclass(frozen=True)
class Damage:
    """How far outputs are from float's.

    Attributes:
        noise: `sum (y - y')^2 / sum y^2`.
        kl: mean over rows of `KL(softmax y || softmax y')`, nats.
        agree: part of the rows whose greatest entry is the same.
    """

    noise: float
    kl: float
    agree: float

    @property
    def sqnr_db(self) -> float:
        """`-10 log10(noise)`, 200 at most."""
        return 200.0 if self.noise <= 1e-20 else -10.0 * float(torch.log10(torch.tensor(self.noise)))


def compared(wanted: Sequence[Tensor], found: Sequence[Tensor]) -> Damage:
    """Outputs [rows, values] of each batch against float's."""
    a, b = torch.cat(list(wanted)).double(), torch.cat(list(found)).double()
    signal = float((a**2).sum())
    noise = float(((a - b) ** 2).sum()) / signal if signal else 0.0
    p, q = F.log_softmax(a, -1), F.log_softmax(b, -1)
    kl = float((p.exp() * (p - q)).sum(-1).mean())
    return Damage(noise, max(kl, 0.0), float((a.argmax(-1) == b.argmax(-1)).double().mean()))

"""What each tensor's rounding does to the output: measured one at a time, accumulated, and by derivatives."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pennyweight.atomic import atomic_write
from pennyweight.errors import FormatError, InputError, nearest
from pennyweight.journal import Journal
from pennyweight.nn.fake import ActivationQuantizer, fake_quantize_per_tensor
from pennyweight.plan import Site
from pennyweight.progress import track
from pennyweight.recipe import Recipe
from pennyweight.tune.fisher import fisher, hessian_traces, task_of
from pennyweight.tune.formats import layer_formats
from pennyweight.tune.probe import Damage, Probe

PARTS = ("both", "weights", "activations", "accumulated")
MEASURES = (*PARTS, "fisher", "hessian")


@dataclass(frozen=True)
class Row:
    """One measurement at the output.

    Attributes:
        layer: module path or call.
        form: name of a layer format.
        part: "both", "weights" or "activations" of this layer alone; "accumulated": of it and all before it.
        sqnr_db, kl, agree: see `probe.Damage`.
        fit: `Tr I(W) mean dW^2 + Tr I(a) mean da^2` of the part, if Fisher traces were asked for.
        hessian: `Tr H / n * |dW|^2` of the weight, likewise.
    """

    layer: str
    form: str
    part: str
    sqnr_db: float
    kl: float
    agree: float
    fit: float | None = None
    hessian: float | None = None

    @property
    def noise(self) -> float:
        """`sum (y - y')^2 / sum y^2`."""
        return float(10 ** (-self.sqnr_db / 10))


@dataclass
class Sensitivity:
    """Everything that was measured.

    Attributes:
        rows: see `Row`.
        traces: Fisher traces of weights and activations by site, "fisher:layer:weight" and the like; Hessian traces.
        fingerprint: of the model, the data and the recipe that it belongs to.
        task: whether outputs were taken for "logits" or "values".
        samples: how many rows of outputs were compared.
        seconds: what it took.
    """

    rows: list[Row] = field(default_factory=list)
    traces: dict[str, float] = field(default_factory=dict)
    fingerprint: str = ""
    task: str = "logits"
    samples: int = 0
    seconds: float = 0.0

    def damage(self, layer: str, form: str, part: str = "both") -> float:
        """The measure that adds up over layers: KL of logits, relative squared error of values.

        Raises:
            InputError: if it was not measured.
        """
        for row in self.rows:
            if (row.layer, row.form, row.part) == (layer, form, part):
                return row.kl if self.task == "logits" else row.noise
        raise InputError(f"{part} of {layer!r} in {form} were not measured", hint="Ask for that format.")

    def ranked(self, form: str, part: str = "both") -> list[Row]:
        """Rows of a format, the most sensitive first."""
        found = [r for r in self.rows if r.form == form and r.part == part]
        return sorted(found, key=lambda r: -(r.kl if self.task == "logits" else r.noise))

    def save(self, path: str | Path) -> None:
        """Write it as JSON."""
        with atomic_write(Path(path)) as file:
            file.write(json.dumps(asdict(self), indent=1).encode())

    @classmethod
    def load(cls, path: str | Path) -> Sensitivity:
        """Read what `save` wrote.

        Raises:
            FormatError: if it is no such file.
        """
        try:
            data = json.loads(Path(path).read_text("utf8"))
            return cls(**{**data, "rows": [Row(**r) for r in data["rows"]]})
        except (json.JSONDecodeError, TypeError, KeyError) as error:
            raise FormatError(f"this is no stored sensitivity: {error}", site=str(path)) from error

    def write(self, journal: Journal) -> None:
        """One `sensitivity` event a row."""
        for row in self.rows:
            journal.add("sensitivity", row.layer, **{k: v for k, v in asdict(row).items() if k != "layer"})

    def table(self) -> list[dict[str, Any]]:
        """Rows for people."""
        return [{k: v for k, v in asdict(r).items() if v is not None} for r in self.rows]


def fingerprint(model: nn.Module, batches: Sequence[Any], recipe: Recipe, samples: int, seed: int) -> str:
    """A digest of weights, data and recipe: what is measured of one is not taken for another's."""
    digest = hashlib.sha256(f"{recipe.to_text()}|{samples}|{seed}".encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(_bytes(tensor))
    for leaf in tree_leaves(list(batches)):
        digest.update(_bytes(leaf) if isinstance(leaf, Tensor) else repr(leaf).encode())
    return digest.hexdigest()[:32]


def _bytes(x: Tensor) -> bytes:
    flat = x.detach().cpu().contiguous().reshape(-1)
    return bytes(flat.view(torch.uint8).numpy().data) if flat.numel() else b""


def sensitivity(
    model: nn.Module,
    data: Iterable[Any],
    *,
    formats: Sequence[str] = ("int8", "int4"),
    measures: Sequence[str] = ("both", "weights", "activations", "accumulated", "fisher"),
    recipe: str | Recipe = "int8",
    samples: int = 64,
    probes: int = 20,
    task: str = "auto",
    cache: str | Path | None = None,
    progress: bool = True,
    seed: int = 0,
    journal: Journal | None = None,
) -> Sensitivity:
    """Measure how much each layer minds each format.

    Args:
        model: a float model in eval mode; left untouched.
        data: calibration batches.
        formats: names of layer formats, such as "int8", "int4", "bf16", "w4a4".
        measures: "both", "weights", "activations": each layer alone; "accumulated": all layers up to it; "fisher": FIT
            scores from one backward pass a batch; "hessian": Hutchinson's traces.
        recipe: what "int8" means.
        samples: inputs on which outputs are compared.
        probes: of Hutchinson's estimator.
        task: see `fisher.task_of`.
        cache: a JSON file: what it holds of the same model, data and recipe is reused, what is missing is added.
        progress: show a bar.
        seed: of everything random.
        journal: filled if given.

    Raises:
        InputError: on an unknown measure.
        RegistryError: on an unknown format.
        EmptyCalibration: if there is no batch.
    """
    for measure in measures:
        if measure not in MEASURES:
            raise InputError(f"there is no measure {measure!r}", hint=nearest(measure, MEASURES, "measures"))
    batches = list(data)
    chosen = Recipe.preset(recipe) if isinstance(recipe, str) else recipe
    mark = fingerprint(model, batches, chosen, samples, seed)
    known = Sensitivity.load(cache) if cache is not None and Path(cache).exists() else Sensitivity()
    if known.fingerprint != mark:
        known = Sensitivity(fingerprint=mark)
    if _missing(known, formats, measures):
        start = time.perf_counter()
        probe = Probe(model, batches, formats, chosen, samples=samples, seed=seed)
        measure_on(
            probe, known, measures, probes=probes, task=task, seed=seed, progress=progress, deadline=None
        )
        known.seconds += time.perf_counter() - start
        if cache is not None:
            known.save(cache)
    if journal is not None:
        known.write(journal)
    return known


def _missing(known: Sensitivity, formats: Sequence[str], measures: Sequence[str]) -> bool:
    have = {(r.form, r.part) for r in known.rows}
    parts = [m for m in measures if m in PARTS]
    derived = {"fisher": "fisher:", "hessian": "hessian:"}
    lacks = [m for m in measures if m in derived and not any(k.startswith(derived[m]) for k in known.traces)]
    return bool(lacks) or any((f, p) not in have for f in formats for p in parts)


def measure_on(
    probe: Probe,
    into: Sensitivity,
    measures: Sequence[str],
    *,
    probes: int = 20,
    task: str = "auto",
    seed: int = 0,
    progress: bool = False,
    deadline: Callable[[], bool] | None = None,
    wanted: set[tuple[str, str]] | None = None,
) -> Sensitivity:
    """Add what is missing to `into`; stops when `deadline()` says so.

    wanted: pairs of layers and formats, all by default. See `sensitivity` for the rest.
    """
    into.task = task_of(probe.reference[0], task)
    into.samples = sum(len(t) for t in probe.reference)
    _derivatives(probe, into, measures, probes, task, seed)
    have = {(r.layer, r.form, r.part) for r in into.rows}
    jobs = [
        (layer, form, part)
        for part in PARTS if part in measures and part != "accumulated"
        for form in probe.formats if form != "float32"
        for layer in probe.layers
        if form in probe.choices(layer) and (layer, form, part) not in have
        and (wanted is None or (layer, form) in wanted)
        and (part != "weights" or layer in probe.matrices)
    ]  # fmt: skip
    for layer, form, part in track(jobs, "sensitivity", show=progress):
        if deadline is not None and deadline():
            return into
        probe.set(layer, form, weight=part != "activations", activations=part != "weights")
        into.rows.append(_row(probe, into, layer, form, part, probe.damage()))
        probe.set(layer, None)
    if "accumulated" in measures:
        for form in probe.formats:
            if form != "float32" and not any((layer, form, "accumulated") in have for layer in probe.layers):
                _accumulate(probe, into, form)
    return into


def _accumulate(probe: Probe, into: Sensitivity, form: str) -> None:
    """Layers given a format one after the other, in order of execution, and what lies between them too."""
    order = [n.name for n in probe.graph if n.kind in ("module", "call")]
    for name in dict.fromkeys(order):
        if name in probe.between:
            probe.set(name, "int8")
        elif name in probe.layers and form in probe.choices(name):
            probe.set(name, form)
            into.rows.append(_row(probe, into, name, form, "accumulated", probe.damage()))
    for name in [*probe.layers, *probe.between]:
        probe.set(name, None)


def _row(probe: Probe, into: Sensitivity, layer: str, form: str, part: str, damage: Damage) -> Row:
    fit = curved = None
    if part != "accumulated":
        fit = fit_of(probe, into, layer, form, part)
        curved = _curved(probe, into, layer, form) if part != "activations" else None
    return Row(layer, form, part, damage.sqnr_db, damage.kl, damage.agree, fit, curved)


def weight_site(layer: str, name: str) -> str:
    """The site of a weight, as plans call it."""
    path, _, call_name = layer.partition(":")
    return str(Site(path, f"{call_name}:{name}" if call_name else name))


def _derivatives(
    probe: Probe, into: Sensitivity, measures: Sequence[str], probes: int, task: str, seed: int
) -> None:
    """Fisher and Hessian traces, if they are asked for and not known."""
    params = dict(probe.model.named_parameters())
    weights = {}
    for layer, named in probe.matrices.items():
        for name in named:
            tensor = params.get(f"{layer}.{name}") if ":" not in layer else None
            if tensor is not None:
                weights[weight_site(layer, name)] = tensor
    if "fisher" in measures and not any(k.startswith("fisher:") for k in into.traces):
        sites = {
            m.site: m
            for m in probe.model.modules()
            if isinstance(m, ActivationQuantizer)
        }  # fmt: skip
        found = fisher(probe.model, probe.batches, weights, sites, task=task, seed=seed)
        into.traces |= {f"fisher:{site}": v for site, v in {**found.weights, **found.inputs}.items()}
        into.traces |= {f"error:{k}": v for k, v in _input_errors(probe).items()}
    if "hessian" in measures and not any(k.startswith("hessian:") for k in into.traces):
        traces = hessian_traces(probe.model, probe.batches, weights, probes=probes, task=task, seed=seed)
        into.traces |= {f"hessian:{site}": v for site, v in traces.items()}


def _input_errors(probe: Probe) -> dict[str, float]:
    """Mean squared rounding error of every activation by `site|format`, on the probed samples."""
    totals: dict[str, list[float]] = {}

    def watch(quantizer: ActivationQuantizer, forms: dict[str, tuple[Any, Tensor, Tensor]]) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            for form, (spec, scale, zero) in forms.items():
                change = (fake_quantize_per_tensor(args[0].float(), scale, zero, spec) - args[0]).double()
                totals.setdefault(f"{quantizer.site}|{form}", []).append(float((change**2).mean()))

        return hook

    handles = []
    for layer in probe.layers:
        for quantizer in probe.quantizers_of(layer):
            forms = {}
            for form in probe.choices(layer):
                if layer_formats[form].integer:
                    probe.set(layer, form)
                    forms[form] = (quantizer.spec, quantizer.scale.clone(), quantizer.zero.clone())
            probe.set(layer, None)
            handles.append(quantizer.register_forward_pre_hook(watch(quantizer, forms)))
    try:
        probe.outputs()
    finally:
        for handle in handles:
            handle.remove()
    return {k: sum(v) / len(v) for k, v in totals.items()}


def fit_of(probe: Probe, into: Sensitivity, layer: str, form: str, part: str = "both") -> float | None:
    """`Tr I(W) mean dW^2 + Tr I(a) mean da^2` of a layer in a format; None where no trace is known.

    Source: Zandonati et al. 2022 (arXiv:2210.08502), equation 12.
    """
    total, any_found = 0.0, False
    for name, matrix in probe.matrices.get(layer, {}).items() if part != "activations" else ():
        trace = into.traces.get(f"fisher:{weight_site(layer, name)}")
        solved = probe.solved(layer, name, form)
        if trace is not None and solved is not None:
            change = solved.weight.dequantize() - matrix
            total, any_found = total + trace * float((change.double() ** 2).mean()), True
    for quantizer in probe.quantizers_of(layer) if part != "weights" else ():
        trace = into.traces.get(f"fisher:{quantizer.site}")
        error = into.traces.get(f"error:{quantizer.site}|{form}")
        if trace is not None and error is not None:
            total, any_found = total + trace * error, True
    return total if any_found else None


def _curved(probe: Probe, into: Sensitivity, layer: str, form: str) -> float | None:
    """`sum over weights of Tr H / n * |dW|^2`."""
    total, any_found = 0.0, False
    for name, matrix in probe.matrices.get(layer, {}).items():
        trace = into.traces.get(f"hessian:{weight_site(layer, name)}")
        solved = probe.solved(layer, name, form)
        if trace is not None and solved is not None:
            change = solved.weight.dequantize() - matrix
            total += trace / matrix.numel() * float((change.double() ** 2).sum())
            any_found = True
    return total if any_found else None

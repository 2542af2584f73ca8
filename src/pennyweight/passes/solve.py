"""Find the codes of every weight."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from inspect import signature
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from pennyweight.errors import EmptyCalibration, PennyweightError, RecipeError
from pennyweight.nn import twins
from pennyweight.nn.calls import CallTwin, call_matrix
from pennyweight.nn.conv import ConvTwin
from pennyweight.nn.fake import ActivationQuantizer
from pennyweight.passes import Context, Stage, passes
from pennyweight.plan import LayerPlan
from pennyweight.progress import track
from pennyweight.qtensor import QTensor
from pennyweight.ranges import RangeRule, ranges
from pennyweight.reconstruction.capture import floating
from pennyweight.reconstruction.gram import expected_gram, has_rows, input_gram
from pennyweight.reconstruction.normals import propagate
from pennyweight.reconstruction.paired import paired, seen_inputs, steady_pull
from pennyweight.reconstruction.replay import Replay
from pennyweight.solvers import Solver, input_solvers, solvers
from pennyweight.solvers.retarget import retarget


def weights(model: nn.Module, params: dict[str, Tensor]) -> list[tuple[Any, str, Tensor]]:
    """Every (twin, weight name, matrix [out, in]) of a prepared model that its plan quantizes."""
    found: list[tuple[Any, str, Tensor]] = []
    for module in model.modules():
        layer = getattr(module, "layer", None)
        if (
            not isinstance(layer, LayerPlan) or layer.weight is None
        ):  # users call their own modules `layer` too
            continue
        if isinstance(module, CallTwin):
            found.append((module, "weight", call_matrix(module, params[module.param])))
        elif layer.kind in twins and hasattr(module, "solved"):
            found += [(module, name, w) for name, w in twins[layer.kind].matrices(module).items()]
    return found


def sqnr(x: Tensor, y: Tensor) -> float:
    """Signal to quantization noise, `10 log10(sum x^2 / sum (x - y)^2)`, in dB; 200 at most."""
    noise = float(((x - y).double() ** 2).sum())
    signal = float((x.double() ** 2).sum())
    if noise == 0 or signal == 0:
        return 200.0
    return float(10 * torch.log10(torch.tensor(signal / noise)))


@passes.register("solve")
@dataclass(frozen=True)
class Solve:
    """One solver for every weight.

    A solver that reads inputs (`input_solvers`) takes the layers in the order they run, each with the second moments
    of its inputs in the network as quantized so far. Layers whose inputs it cannot be shown (recurrent and transposed
    ones, attention, embeddings, function calls) are rounded to nearest.

    With `inputs = "norms"` these moments are those that folded batch norms imply (`reconstruction.normals`), so that no
    data are needed; layers that no norm lies before see the batches, or the example.

    With `retarget` every layer aims at what it answers in the float network, though its inputs are not those any more:

        min_{W', b'} E |W' x~ + b' - W x - b|^2

    with x of the float network and x~ of the network as quantized so far. The solver gets Cov[x~] and, for the weight,
    the W* that `solvers.retarget` finds; then `b' = b + W E[x] - W' E[x~]`, so that no bias need be corrected after.

    Args:
        solver: name of a solver.
        range: name of the range rule it starts from.
        options: options of the range rule.
        solver_options: options of the solver.
        inputs: "data" or "norms".
        alike: with norms, how much neighbouring values of a channel correlate.
        retarget: see above; for solvers that read inputs, from data.
        pull: share of the inputs' mean variance that pulls W* toward W; 0 stands for each layer's own, by what a
            weight from one half of the inputs does on the other.

    Source of `retarget`: Zhang et al. 2025, "Qronos" (arXiv:2505.11695); Li et al. 2025, "GPTAQ" (arXiv:2504.02692).
    """

    solver: str = "rtn"
    range: str = "minmax"
    options: dict[str, Any] = field(default_factory=dict)
    solver_options: dict[str, Any] = field(default_factory=dict)
    inputs: Literal["data", "norms"] = "data"
    alike: float = 0.6
    retarget: bool = False
    pull: float = 0.0
    stage: ClassVar[Stage] = "solve"
    preserves_output: ClassVar[bool] = False

    @property
    def replays(self) -> bool:
        """Whether the batches are read again."""
        return self.solver not in solvers and self.solver in input_solvers

    def needs(self) -> set[str]:
        """Nothing.

        Raises:
            RegistryError: if there is no such solver.
            RecipeError: if layers are to be aimed anew by a solver that reads no inputs, or without data; if `pull` is
                below 0.
        """
        if not self.replays:
            solvers[self.solver]
        if self.retarget and (not self.replays or self.inputs != "data"):
            raise RecipeError(
                f"retarget with solver {self.solver!r} and inputs {self.inputs!r}",
                hint=f'It needs inputs = "data" and a solver of {", ".join(sorted(input_solvers))}.',
            )
        if self.pull < 0:
            raise RecipeError(f"pull = {self.pull}", hint="Above 0, or left out.")
        return set()

    def run(self, context: Context) -> None:
        """Solve every weight; one `weight` event each, with the error in dB."""
        rule = ranges[self.range](**self.options)
        found = weights(context.model, dict(context.model.named_parameters()))
        if self.replays:
            self._in_order(context, rule, found)
            return
        for twin, name, matrix in found:
            solve_one(context, twin, name, matrix, self._bound(twin), rule)

    def _bound(self, twin: Any) -> Solver:
        """The solver with its options, and with the layer's taps if it heeds them."""
        solver, options = solvers[self.solver], dict(self.solver_options)
        if "taps" in signature(solver).parameters and isinstance(twin, ConvTwin):
            options.setdefault("taps", math.prod(twin.kernel_size))
        return partial(solver, **options) if options else solver

    def _in_order(self, context: Context, rule: RangeRule, found: list[tuple[Any, str, Tensor]]) -> None:
        """Layers as they run, each behind a quantized network.

        Raises:
            EmptyCalibration: if there is no batch to see inputs in.
        """
        place = {node.name: node.id for node in reversed(context.graph.nodes)}
        found.sort(key=lambda item: place.get(item[0].layer.name, -1))
        for quantizer in context.model.modules():
            if isinstance(quantizer, ActivationQuantizer) and quantizer.calibrated:
                quantizer.active = True
        known = propagate(context.graph, context.model, context.outputs) if self.inputs == "norms" else {}
        source, order = partial(_batches, context, self.solver), [twin.layer.name for twin, _, _ in found]
        replay = Replay(context.model, context.graph, source, order)
        floats = Replay(context.model, context.graph, source, order)
        for twin, name, matrix in track(found, self.solver, show=context.progress):
            once = len(context.graph.modules(twin.layer.name)) == 1
            if self.retarget and has_rows(twin):
                self._aimed(context, rule, (twin, name, matrix), (replay, floats), once=once)
                continue
            solver: Solver = solvers["rtn"]
            if has_rows(twin):
                refs = {node.inputs[0] for node in context.graph.modules(twin.layer.name)} & known.keys()
                if refs and once:
                    gram = expected_gram(twin, known[refs.pop()], self.alike)  # type: ignore[index]
                else:
                    with replay.running():
                        gram = input_gram(context.model, replay.batches(), twin, once=once)
                if gram.numel():
                    solver = self._reading(gram)
            solve_one(context, twin, name, matrix, solver, rule)
            if has_rows(twin) and once and self.inputs == "data":
                replay.settle(twin.layer.name)

    def _reading(self, gram: Tensor) -> Solver:
        return partial(input_solvers[self.solver], gram=gram, **self.solver_options)

    def _aimed(
        self, context: Context, rule: RangeRule, found: tuple[Any, str, Tensor], replays: tuple[Replay, Replay], *,
        once: bool,
    ) -> None:  # fmt: skip
        """One layer, and its bias, toward its results in the float network."""
        (twin, name, matrix), (replay, floats) = found, replays
        with floating(context.model), floats.running():
            inputs = seen_inputs(context.model, floats.batches(), twin, once=once)
        with replay.running():
            halves = paired(context.model, replay.batches(), twin, inputs, once=once)
        if not halves:
            solve_one(context, twin, name, matrix, solvers["rtn"], rule)
            return
        met = halves[0] + halves[1]
        pull = self.pull or steady_pull(matrix, halves)
        target = retarget(matrix, met.gram, met.cross, pull)
        q = solve_one(context, twin, name, target, self._reading(met.gram), rule)
        twin.bias_shift = met.shift(matrix, q.dequantize().reshape(matrix.shape))
        report_shift(context, twin.layer.name, twin.bias_shift)
        if once:
            replay.settle(twin.layer.name)
            with floating(context.model):
                floats.settle(twin.layer.name)


def _batches(context: Context, what: str) -> Iterable[Any]:
    batches = context.inputs()
    if isinstance(batches, list | tuple) and not batches:
        raise EmptyCalibration(
            f"{what!r} reads inputs, but there is no batch", hint="Pass some hundred inputs."
        )
    return batches


def report_shift(context: Context, path: str, shift: Tensor) -> None:
    """Journal what a bias was shifted by: the largest, and the root of the mean square."""
    rms = float(torch.sqrt((shift**2).mean()))
    context.journal.add("bias", path, largest=float(shift.abs().max()), rms=rms)


def solve_one(
    context: Context, twin: Any, name: str, matrix: Tensor, solver: Solver, rule: RangeRule
) -> QTensor:
    """Solve one weight of a twin and journal it; errors name the site."""
    site = f"{twin.layer.name}:{name}"
    try:
        q: QTensor = solver(matrix.float(), twin.layer.weight, rule)
    except PennyweightError as error:
        error.site = error.site or site
        raise type(error)(
            error.what, site=error.site, spec=error.spec, shapes=error.shapes, hint=error.hint
        ) from error
    twin.solved[name] = q
    before = matrix.numel() * matrix.element_size()
    context.journal.add(
        "weight",
        site,
        spec=str(q.spec),
        sqnr_db=sqnr(matrix, q.dequantize()),
        before=before,
        after=q.nbytes,
    )
    return q

"""Take back what rounding the weights adds to a layer's mean output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, cast, runtime_checkable

from torch import Tensor

from pennyweight.graph.graph import Ref
from pennyweight.nn.fake import ActivationQuantizer
from pennyweight.passes import Context, Stage, passes
from pennyweight.passes.solve import report_shift, weights
from pennyweight.plan import LayerPlan
from pennyweight.progress import track
from pennyweight.qtensor import QTensor
from pennyweight.reconstruction.capture import floating, mean_outputs
from pennyweight.reconstruction.normals import Channels, propagate
from pennyweight.reconstruction.replay import Replay
from pennyweight.stats.moments import Moments


@runtime_checkable
class Corrigible(Protocol):
    """A twin whose mean output follows from the means of its inputs."""

    layer: LayerPlan
    input: ActivationQuantizer | None
    bias_shift: Tensor | None
    solved: dict[str, QTensor]

    def expected(self, change: Tensor, means: Tensor) -> Tensor:
        """What a change of the weight adds to the outputs on average."""
        ...


@passes.register("correct_bias")
@dataclass(frozen=True)
class CorrectBias:
    """`b' = b + (W - W') E[x]`, with E[x] the mean of every input channel of the float network on the calibration data.

    The rounding errors of a channel's few weights do not cancel where the inputs have a mean, as behind a ReLU: its
    outputs are all shifted, most of all in depthwise layers. Each layer is corrected for its own weights alone, so that
    the corrections do not add up along the network. Costs nothing at run time. Layers that are ranged at run time,
    attention and functional layers are left as they are.

    With `source = "norms"` E[x] is what folded batch norms say, followed through the graph by
    `reconstruction.normals`; layers that no norm lies before take the measured means.

    With `source = "outputs"` the shift is measured instead of computed: layer by layer in the order they run,

        b' = b + E[y] - E[y'],  y of the float network, y' of the network as quantized and corrected so far

    which also takes back what rounded activations and earlier layers add, at one run up to each layer.

    Args:
        source: "data", "norms" or "outputs".
        keep: leave a bias as it is that a pass before has shifted: retargeted layers have theirs.

    Source: Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction"
    (arXiv:1906.04721), section 4.2, with measured means for E[x]; Finkelstein et al. 2019 (arXiv:1906.03193).
    """

    source: Literal["data", "norms", "outputs"] = "data"
    keep: bool = False
    stage: ClassVar[Stage] = "solve"
    preserves_output: ClassVar[bool] = False

    def needs(self) -> set[str]:
        """Means of the inputs, channel by channel."""
        return {"moments"}

    def run(self, context: Context) -> None:
        """Shift every bias; one `bias` event each, with the largest shift and the root of their mean square."""
        if self.source == "outputs":
            self._measured(context)
            return
        known = propagate(context.graph, context.model, context.outputs) if self.source == "norms" else {}
        for twin, name, matrix in weights(context.model, dict(context.model.named_parameters())):
            means = _expected(context, known, twin)
            if means is None or self._kept(twin):
                continue
            change = matrix.double() - twin.solved[name].dequantize().reshape(matrix.shape).double()
            shift = twin.expected(change, means)
            twin.bias_shift = shift.float()
            report_shift(context, twin.layer.name, shift)

    @property
    def replays(self) -> bool:
        """Whether layers are measured one by one."""
        return self.source == "outputs"

    def _kept(self, twin: Any) -> bool:
        return self.keep and twin.bias_shift is not None

    def _measured(self, context: Context) -> None:
        model = context.model
        for quantizer in model.modules():
            if isinstance(quantizer, ActivationQuantizer) and quantizer.calibrated:
                quantizer.active = True
        found = {
            node.path: model.get_submodule(node.path)
            for node in context.graph
            if node.kind == "module" and node.path in context.plan.layers
        }
        twins = {
            p: m
            for p, m in found.items()
            if isinstance(m, Corrigible) and m.input is not None and m.solved and not self._kept(m)
        }
        if not twins:
            return
        with floating(model):
            wanted = mean_outputs(model, context.inputs(), twins)
        replay = Replay(model, context.graph, context.inputs, twins)
        for path, twin in track(twins.items(), "correct biases", total=len(twins), show=context.progress):
            twin.bias_shift = None
            once = len(context.graph.modules(path)) == 1
            with replay.running():
                shift = wanted[path] - mean_outputs(model, replay.batches(), {path: twin}, stop=once)[path]
            twin.bias_shift = shift.float()
            if once:
                replay.settle(path)
            report_shift(context, path, shift)


def _expected(context: Context, known: dict[Ref, Channels], twin: object) -> Tensor | None:
    """Means of a twin's input channels: from norms where they are known, else from what was seen, or None."""
    if isinstance(twin, Corrigible) and twin.solved and known:
        refs = {node.inputs[0] for node in context.graph.modules(twin.layer.name)}
        ref = refs.pop() if len(refs) == 1 else None
        if ref is not None and ref in known:
            return known[ref].mean
    moments = _moments(twin)
    return None if moments is None else moments.mean


def _moments(twin: object) -> Moments | None:
    """What calibration saw of a twin's input, if it can be corrected by it."""
    if not isinstance(twin, Corrigible) or twin.input is None or not twin.solved:
        return None
    found = cast("Moments | None", twin.input.statistics.get("moments"))
    return found if found is not None and found.rows else None

"""A peer's quantized network and the classes that it gives the images.

usage: classes.py METHOD NETWORK OPTIONS FILE

Run by `peers_accuracy.py` with the Python of the peers' environment. METHOD is a key of METHODS: a function that takes
a network of `pictures.py` and gives the quantized network as a function from one float batch to logits, as arrays or
tensors. OPTIONS are the arguments of `pictures.network_of` as JSON. Every peer calibrates on the batches
that ours calibrates on, in its own recommended way. The classes of the test images are written to FILE as an array.

Environments: requirements.txt beside this file for NNCF and ONNX Runtime; brevitas 0.13.4 with dependencies 2.0.1 (it
cannot be imported with later ones); neural-compressor-pt 3.10; aimet-torch 2.42.0 with all it requires but
torchvision, whose names it reads and does not need. Each with torch 2.13.0, NumPy and Pillow.
"""

from __future__ import annotations

import json
import sys
import tempfile
import types
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

here = Path(__file__).resolve().parent
sys.path.insert(0, str(here.parent))

import torch  # noqa: E402
from pictures import Network, network_of  # noqa: E402

Run = Callable[[torch.Tensor], Any]
ROUNDED = 1000  # steps of AIMET's AdaRound a layer; its default is 10,000
LAST = 1000  # brevitas knows a classifier by so many results


def nncf(network: Network, preset: str) -> Run:
    """`nncf.quantize` on OpenVINO's form of the network, as OpenVINO runs it."""
    import nncf as tool
    import openvino

    batches = [x.numpy() for x in network.calibration_batches()]
    model = openvino.convert_model(network.model, example_input=torch.from_numpy(batches[0]))
    data = tool.Dataset(batches, lambda x: x)
    model = tool.quantize(
        model, data, subset_size=len(batches), preset=getattr(tool.QuantizationPreset, preset)
    )
    compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda x: next(iter(compiled(x.numpy()).values()))


def onnxruntime(network: Network, activations: str) -> Run:
    """`quantize_static`: QDQ, activations at their extremes, int8 weights per channel."""
    import onnxruntime as tool
    from onnxruntime import quantization as q

    class Reader(q.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.rest = iter([{"x": x.numpy()} for x in network.calibration_batches()])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.rest, None)

    with tempfile.TemporaryDirectory() as folder:
        raw, ready, done = (str(Path(folder) / f"{n}.onnx") for n in ("raw", "ready", "done"))
        example = next(network.calibration_batches())
        torch.onnx.export(
            network.model, (example,), raw, input_names=["x"], dynamic_axes={"x": {0: "n"}}, dynamo=False,
            opset_version=17,
        )  # fmt: skip
        q.quant_pre_process(raw, ready, skip_symbolic_shape=True)
        q.quantize_static(
            ready, done, Reader(), per_channel=True, activation_type=getattr(q.QuantType, activations),
            weight_type=q.QuantType.QInt8,
        )  # fmt: skip
        session = tool.InferenceSession(done, providers=["CPUExecutionProvider"])
    return lambda x: session.run(None, {"x": x.numpy()})[0]


def inc(network: Network) -> Run:
    """Neural Compressor's static PT2E workflow, as its own reference network runs."""
    from neural_compressor.torch import export, quantization

    batches = list(network.calibration_batches())
    sizes = ({0: torch.export.Dim("n", min=2)},)
    exported = export.export(network.model, (batches[0],), dynamic_shapes=sizes)
    prepared = quantization.prepare(exported, quant_config=quantization.get_default_static_config())
    for x in batches:
        prepared(x)
    return quantization.convert(prepared)


def padded(model: torch.nn.Module) -> int:
    """Give the classifier LAST results, by which brevitas knows it; returns how many were cut in front.

    Further ones repeat the first; of MobileNetV2 the background is cut.
    """
    name, old = next((n, m) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear))
    cut, new = max(old.out_features - LAST, 0), torch.nn.Linear(old.in_features, LAST)
    rows = torch.arange(cut, cut + LAST)
    rows = torch.where(rows < old.out_features, rows, 0)
    new.load_state_dict({"weight": old.weight[rows], "bias": old.bias[rows]})
    setattr(model, name, new)
    return cut


def brevitas(
    network: Network, weight: int, activation: int, *, relu: bool = False, gptq: bool = False
) -> Run:
    """Layer by layer: graph equalization, searched scales per channel, the 99.999th percentile, biases corrected.

    First convolution and classifier at 8 bits; sums stay unquantized, as its layerwise backend leaves them.
    relu: put ReLU for ReLU6, so that equalization passes it.
    """
    from brevitas.graph.quantize import preprocess_for_quantize
    from brevitas_examples.imagenet_classification.ptq import ptq_common as ptq

    batches = [(x, torch.zeros(len(x))) for x in network.calibration_batches()]
    with torch.no_grad():
        count = network.model(batches[0][0][:1]).shape[1]
    cut = padded(network.model)
    traced = torch.fx.symbolic_trace(network.model)
    for node in traced.graph.nodes:
        if node.op == "call_method" and node.target == "mean":  # it would put a pool that keeps both axes
            node.op, node.target = "call_function", torch.mean
    traced.recompile()
    model = preprocess_for_quantize(
        traced, trace_model=False, relu6_to_relu=relu, equalize_iters=20, equalize_merge_bias=True
    )
    model = ptq.quantize_model(
        model, backend="layerwise", weight_bit_width=weight, act_bit_width=activation, bias_bit_width=32,
        weight_quant_granularity="per_channel", act_quant_percentile=99.999, act_quant_type="asym",
        scale_factor_type="float_scale", quant_format="int", weight_param_method="mse",
    )  # fmt: skip
    with torch.no_grad():
        model.eval()(batches[0][0])
    ptq.calibrate(batches, model)
    if gptq:
        ptq.apply_gptq(batches, model, act_order=True, use_quant_activations=True, create_weight_orig=True)
    ptq.apply_bias_correction(batches, model)
    return lambda x: torch.nn.functional.pad(model(x)[:, : count - cut], (cut, 0), value=-torch.inf)


def aimet(
    network: Network, weight: int, activation: int, *, equalize: bool = False, iterations: int = 0
) -> Run:
    """Norms folded (`equalize`: cross-layer equalization too, which puts ReLU for ReLU6), AdaRound of so many steps a
    layer if any, ranges of least expected error; scales per channel, activations asymmetric, all as its simulator runs.

    First convolution and classifier at 8 bits.
    """
    parts = {name: types.ModuleType(f"torchvision.{name}") for name in ("datasets", "transforms", "ops")}
    for part, layer in (("transforms", "Resize"), ("ops", "RoIPool")):
        setattr(parts[part], layer, type(layer, (torch.nn.Module,), {}))
    whole = types.ModuleType("torchvision")
    vars(whole).update(parts)
    sys.modules.update({"torchvision": whole, **{f"torchvision.{n}": m for n, m in parts.items()}})
    from aimet_torch.adaround.adaround_weight import Adaround, AdaroundParameters
    from aimet_torch.batch_norm_fold import fold_all_batch_norms
    from aimet_torch.common.defs import QuantScheme
    from aimet_torch.common.quantsim_config.utils import get_path_for_per_channel_config
    from aimet_torch.cross_layer_equalization import equalize_model
    from aimet_torch.model_preparer import prepare_model
    from aimet_torch.quantsim import QuantizationSimModel

    batches = list(network.calibration_batches())
    model, example = prepare_model(network.model.eval()), batches[0]
    if equalize:
        equalize_model(model, tuple(example.shape), dummy_input=example)
    else:
        fold_all_batch_norms(model, tuple(example.shape), dummy_input=example)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)}
    ends = [next(iter(layers)), list(layers)[-1]]
    config = get_path_for_per_channel_config()
    with tempfile.TemporaryDirectory() as folder:
        if iterations:
            given = AdaroundParameters(batches, len(batches), default_num_iterations=iterations)
            model = Adaround.apply_adaround(
                model, example, given, folder, "rounded", default_param_bw=weight,
                param_bw_override_list=[(layers[n], 8) for n in ends], default_config_file=config,
            )  # fmt: skip
        sim = QuantizationSimModel(
            model, example, QuantScheme.post_training_tf_enhanced, default_output_bw=activation,
            default_param_bw=weight, config_file=config,
        )  # fmt: skip
        for name in ends:
            sim.model.get_submodule(name).param_quantizers["weight"].bitwidth = 8
        if iterations:
            sim.set_and_freeze_param_encodings(str(Path(folder) / "rounded.encodings"))
    with torch.no_grad():
        sim.compute_encodings(lambda m, _: [m(x) for x in batches], None)
    return sim.model


METHODS: dict[str, Callable[[Network], Run]] = {
    "nncf": partial(nncf, preset="PERFORMANCE"),
    "nncf mixed": partial(nncf, preset="MIXED"),
    "onnxruntime": partial(onnxruntime, activations="QUInt8"),
    "onnxruntime s8": partial(onnxruntime, activations="QInt8"),
    "inc": inc,
    "brevitas W8A8": partial(brevitas, weight=8, activation=8),
    "brevitas W8A8 relu": partial(brevitas, weight=8, activation=8, relu=True),
    "brevitas W4A8": partial(brevitas, weight=4, activation=8, gptq=True),
    "brevitas W4A8 relu": partial(brevitas, weight=4, activation=8, relu=True, gptq=True),
    "brevitas W4A4": partial(brevitas, weight=4, activation=4, gptq=True),
    "aimet W8A8": partial(aimet, weight=8, activation=8),
    "aimet W8A8 equalized": partial(aimet, weight=8, activation=8, equalize=True),
    "aimet W4A8": partial(aimet, weight=4, activation=8, iterations=ROUNDED),
    "aimet W4A8 equalized": partial(aimet, weight=4, activation=8, equalize=True, iterations=ROUNDED),
    "aimet W4A4": partial(aimet, weight=4, activation=4, iterations=ROUNDED),
}


def main() -> None:
    """Quantize, run, write."""
    method, name, options, file = sys.argv[1:5]
    network = network_of(name, **json.loads(options))
    run = METHODS[method](network)
    found = []
    with torch.no_grad():
        for i in range(0, len(network.images), network.batch):
            x = network.prepare(network.images[i : i + network.batch])
            found.append(np.asarray(run(x)).argmax(1))
    np.save(file, np.concatenate(found))


if __name__ == "__main__":
    main()

"""OpenVINO, quantized by NNCF with its own defaults."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import networks
import nncf
import numpy as np
import openvino

Run = Callable[[], np.ndarray]


def _model(name: str, work: Path, batch: int, quantized: bool) -> Any:
    path = work / f"{name}.openvino.{'int8' if quantized else 'float'}.xml"
    if path.is_file():
        return openvino.Core().read_model(path)
    example = networks.inputs(name, 1, batch)
    model = openvino.convert_model(networks.network(name), example_input=example)
    model.reshape({port: list(x.shape) for port, x in zip(model.inputs, example, strict=True)})
    if quantized:
        batches = [[x.numpy() for x in values] for values in networks.calibration(name, batch=batch)]
        kind = nncf.ModelType.TRANSFORMER if name in networks.ENCODERS else None
        data = nncf.Dataset(batches, lambda values: values)
        model = nncf.quantize(model, data, subset_size=len(batches), model_type=kind)
    openvino.save_model(model, path, compress_to_fp16=False)
    return model


def _compiled(name: str, threads: int, work: Path, batch: int, quantized: bool, **options: Any) -> Run:
    config = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", **options}
    request = (
        openvino.Core()
        .compile_model(_model(name, work, batch, quantized), "CPU", config)
        .create_infer_request()
    )
    values = [x.numpy() for x in networks.inputs(name, 1, batch)]
    return lambda: np.asarray(next(iter(request.infer(values).values())))


def int8(name: str, threads: int, work: Path, batch: int) -> Run:
    """Static int8 of `nncf.quantize`, as OpenVINO runs it by default (what stays in float may run in bf16)."""
    return _compiled(name, threads, work, batch, quantized=True)


def int8_vnni(name: str, threads: int, work: Path, batch: int) -> Run:
    """The same; the harness holds oneDNN to AVX-512 VNNI by ONEDNN_MAX_CPU_ISA."""
    return _compiled(name, threads, work, batch, quantized=True)


def float32(name: str, threads: int, work: Path, batch: int) -> Run:
    """Float32 throughout."""
    return _compiled(name, threads, work, batch, quantized=False, INFERENCE_PRECISION_HINT="f32")


def bf16(name: str, threads: int, work: Path, batch: int) -> Run:
    """Float weights, bf16 inference precision."""
    return _compiled(name, threads, work, batch, quantized=False, INFERENCE_PRECISION_HINT="bf16")

"""ONNX Runtime, quantized by its own tools."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import networks
import numpy as np
import onnxruntime
import torch
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantType,
    quant_pre_process,
    quantize_dynamic,
    quantize_static,
)

Run = Callable[[], np.ndarray]


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, name: str, keys: list[str], batch: int) -> None:
        batches = networks.calibration(name, batch=batch)
        self.rest = iter([dict(zip(keys, [x.numpy() for x in b], strict=True)) for b in batches])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.rest, None)


def _keys(name: str) -> list[str]:
    return ["ids", "mask"] if name in networks.ENCODERS else ["x"]


def _float_file(name: str, work: Path, batch: int) -> Path:
    path = work / f"{name}.onnx"
    if not path.is_file():
        raw = work / f"{name}.raw.onnx"
        torch.onnx.export(
            networks.network(name), networks.inputs(name, 1, batch), str(raw), input_names=_keys(name), dynamo=False,
            opset_version=17,
        )  # fmt: skip
        quant_pre_process(str(raw), str(path), skip_symbolic_shape=True)
    return path


def _session(name: str, path: Path, threads: int, batch: int) -> Run:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    values = dict(zip(_keys(name), [x.numpy() for x in networks.inputs(name, 1, batch)], strict=True))
    return lambda: np.asarray(session.run(None, values)[0])


def int8(name: str, threads: int, work: Path, batch: int) -> Run:
    """Static QDQ int8: uint8 activations, int8 weights per channel."""
    path = work / f"{name}.static.onnx"
    if not path.is_file():
        quantize_static(
            str(_float_file(name, work, batch)), str(path), _Reader(name, _keys(name), batch), per_channel=True,
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
        )  # fmt: skip
    return _session(name, path, threads, batch)


def dynamic(name: str, threads: int, work: Path, batch: int) -> Run:
    """Dynamic int8, weights per channel."""
    path = work / f"{name}.dynamic.onnx"
    if not path.is_file():
        quantize_dynamic(
            str(_float_file(name, work, batch)), str(path), weight_type=QuantType.QInt8, per_channel=True
        )
    return _session(name, path, threads, batch)


def float32(name: str, threads: int, work: Path, batch: int) -> Run:
    """Float32."""
    return _session(name, _float_file(name, work, batch), threads, batch)

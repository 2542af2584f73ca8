"""ExecuTorch with the XNNPACK delegate, quantized by its own quantizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import networks
import numpy as np
import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
    XNNPACKQuantizer,
    get_symmetric_quantization_config,
)
from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower
from executorch.extension.pybindings import portable_lib
from executorch.runtime import Runtime
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

Run = Callable[[], np.ndarray]


def _file(name: str, work: Path, batch: int, is_dynamic: bool) -> Path:
    path = work / f"{name}.executorch.{'dynamic' if is_dynamic else 'int8'}.pte"
    if path.is_file():
        return path
    example = networks.inputs(name, 1, batch)
    with torch.no_grad():
        exported = torch.export.export(networks.network(name), example).module()
        config = get_symmetric_quantization_config(is_per_channel=True, is_dynamic=is_dynamic)
        prepared = prepare_pt2e(exported, XNNPACKQuantizer().set_global(config))
        for values in networks.calibration(name, batch=batch):
            prepared(*values)
        program = torch.export.export(convert_pt2e(prepared), example)
        edge = to_edge_transform_and_lower(
            program,
            compile_config=EdgeCompileConfig(_check_ir_validity=False),
            partitioner=[XnnpackPartitioner()],
        )
        edge.to_executorch().save(str(path))
    return path


def _method(name: str, threads: int, work: Path, batch: int, is_dynamic: bool) -> Run:
    path = _file(name, work, batch, is_dynamic)
    portable_lib._unsafe_reset_threadpool(threads)
    method = Runtime.get().load_program(path).load_method("forward")
    example = networks.inputs(name, 1, batch)
    return lambda: np.asarray(method.execute(example)[0].numpy())


def int8(name: str, threads: int, work: Path, batch: int) -> Run:
    """Static int8, weights per channel."""
    return _method(name, threads, work, batch, is_dynamic=False)


def dynamic(name: str, threads: int, work: Path, batch: int) -> Run:
    """Dynamic int8, weights per channel; XNNPACK does that for linear layers alone."""
    return _method(name, threads, work, batch, is_dynamic=True)

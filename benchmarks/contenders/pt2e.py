"""PyTorch's export road: PT2E quantization of torchao with the x86 quantizer, compiled by Inductor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import networks
import numpy as np
import torch
import torch._inductor.config
from torchao.quantization.pt2e import move_exported_model_to_eval
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
    X86InductorQuantizer,
    get_default_x86_inductor_quantization_config,
)

Run = Callable[[], np.ndarray]


def _compiled(name: str, threads: int, batch: int, is_dynamic: bool) -> Run:
    torch.set_num_threads(threads)
    torch._inductor.config.freezing = True  # as the tutorial of PT2E on x86 says; packs the weights ahead
    example = networks.inputs(name, 1, batch)
    with torch.no_grad():
        exported = torch.export.export(networks.network(name), example).module()
        config = get_default_x86_inductor_quantization_config(is_dynamic=is_dynamic)
        prepared = prepare_pt2e(exported, X86InductorQuantizer().set_global(config))
        for values in networks.calibration(name, batch=batch):
            prepared(*values)
        converted = convert_pt2e(prepared)
        move_exported_model_to_eval(converted)
        model = torch.compile(converted)
        for _ in range(3):
            model(*example)

    def run() -> np.ndarray:
        with torch.no_grad():
            found: torch.Tensor = model(*example)
        return found.numpy()

    return run


def int8(name: str, threads: int, work: Path, batch: int) -> Run:
    """Static int8."""
    return _compiled(name, threads, batch, is_dynamic=False)


def dynamic(name: str, threads: int, work: Path, batch: int) -> Run:
    """Dynamic int8."""
    return _compiled(name, threads, batch, is_dynamic=True)

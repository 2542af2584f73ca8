"""PyTorch itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import networks
import numpy as np
import torch


def float32(name: str, threads: int, work: Path, batch: int) -> Callable[[], np.ndarray]:
    """Eager float32."""
    torch.set_num_threads(threads)
    model, example = networks.network(name), networks.inputs(name, 1, batch)

    def run() -> np.ndarray:
        with torch.inference_mode():
            found: torch.Tensor = model(*example)
        return found.numpy()

    return run

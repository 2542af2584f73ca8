"""A child process that runs one model and prints the memory it took: `python -m pennyweight.cli.memory KIND WHAT ...`.

KIND "file" runs a .dwt file without torch; "model" runs a float model under PyTorch. Prints one JSON object.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from pennyweight.measure import peak_bytes


def file_peak(path: str, batch: int, threads: int, backend: str) -> dict[str, Any]:
    """Memory of loading and running a .dwt file three times."""
    import pennyweight.runtime as runtime

    before = peak_bytes()
    session = runtime.load(path, backend=backend, threads=threads)
    inputs = example_arrays(session, batch)
    for _ in range(3):
        session.run(inputs)
    return {"before": before, "peak": peak_bytes(), "torch": "torch" in sys.modules}


def example_arrays(session: Any, batch: int) -> dict[str, Any]:
    """Inputs that a session takes: noise for floats, zeros for indices; every free first size is `batch`."""
    import numpy as np

    generator = np.random.default_rng(0)
    arrays = {}
    for port in session.inputs:
        free = session.program.symbols
        shape = [batch if d == port.shape[0] and isinstance(d, str) else free.get(d, d) for d in port.shape]
        if port.dtype == "float32":
            arrays[port.name] = generator.standard_normal(shape, dtype=np.float32)
        else:
            arrays[port.name] = np.zeros(shape, port.dtype)
    return arrays


def model_peak(reference: str, batch: int, threads: int) -> dict[str, Any]:
    """Memory of building and running a float model three times."""
    import torch

    from pennyweight.cli.models import load_model
    from pennyweight.graph.record import call

    torch.set_num_threads(threads or torch.get_num_threads())
    before = peak_bytes()
    loaded = load_model(reference)
    inputs = resized(loaded.example, batch)
    with torch.inference_mode():
        for _ in range(3):
            call(loaded.model, inputs)
    return {"before": before, "peak": peak_bytes(), "torch": True}


def resized(example: Any, batch: int) -> Any:
    """The example with its first axis repeated or cut to `batch`."""
    import torch
    from torch.utils._pytree import tree_map

    def fit(x: Any) -> Any:
        if not isinstance(x, torch.Tensor) or x.ndim == 0:
            return x
        return x.repeat(-(-batch // max(len(x), 1)), *[1] * (x.ndim - 1))[:batch].contiguous()

    return tree_map(fit, example)


def main() -> None:
    """Entry point."""
    kind, what, batch, threads, *rest = sys.argv[1:]
    if kind == "file":
        print(json.dumps(file_peak(what, int(batch), int(threads), rest[0])))
    else:
        print(json.dumps(model_peak(what, int(batch), int(threads))))


if __name__ == "__main__":
    main()

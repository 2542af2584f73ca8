"""What a run will take, before it is started."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from pennyweight.llm.directory import Directory
from pennyweight.llm.schemes import Scheme
from pennyweight.llm.skeleton import Skeleton

FLOAT = 4


@dataclass(frozen=True)
class Estimate:
    """Sizes in bytes, of a run and its result.

    Attributes:
        blocks: number of blocks.
        parameters: of the model.
        block: one block as float32.
        embeddings: tables and whatever else runs before the blocks, as float32.
        states: hidden states of the calibration windows.
        gram: the largest matrix of second moments, and what GPTQ makes of it.
        memory: peak above the interpreter and its packages.
        result: the quantized model.
        disk: the result, its parts, and hidden states twice while they are replaced.
        bits: stored bits per weight of the blocks' linear layers.
        operations: multiplications of forward passes and of solving.
    """

    blocks: int
    parameters: int
    block: int
    embeddings: int
    states: int
    gram: int
    memory: int
    result: int
    disk: int
    bits: float
    operations: int


def estimate(directory: Directory, skeleton: Skeleton, scheme: Scheme, ids: Tensor | None) -> Estimate:
    """Sizes of a run: exact for what is stored, from above for what is computed.

    ids: calibration windows [windows, length], or None where the method reads none.
    """
    parameters = sum(p.numel() for p in skeleton.model.parameters())
    each = [sum(p.numel() for p in skeleton.block(i).parameters()) for i in range(len(skeleton.blocks))]
    block = FLOAT * max(each)
    tables = [m.weight for m in skeleton.model.modules() if isinstance(m, nn.Embedding)]
    embeddings = FLOAT * sum(t.numel() for t in tables)
    layers = {
        path: (m.out_features, m.in_features)
        for path, m in skeleton.model.named_modules()
        if isinstance(m, nn.Linear) and skeleton.inside(path)
    }
    stored = sum(scheme.weight.bits_per_element(s) * s[0] * s[1] / 8 for s in layers.values())
    weights = sum(s[0] * s[1] for s in layers.values())
    rest = (parameters - weights) * directory.nbytes // max(parameters, 1)
    tokens = 0 if ids is None else ids.numel()
    width = max((t.shape[-1] for t in tables), default=0)
    states = FLOAT * tokens * width
    widest = max(s[1] for s in layers.values())
    gram = 0 if ids is None else 6 * FLOAT * widest**2
    working = FLOAT * 8 * 2048 * max(max(s) for s in layers.values())
    result = int(stored + rest)
    passes = 6 * tokens * weights
    solving = sum(s[1] ** 3 + s[0] * s[1] ** 2 for s in layers.values()) if tokens else 0
    return Estimate(
        len(skeleton.blocks), parameters, block, embeddings, states, gram,
        max(embeddings, block + block // 2 + gram) + states + working, result, 2 * result + 2 * states,
        8 * stored / max(weights, 1), passes + solving,
    )  # fmt: skip

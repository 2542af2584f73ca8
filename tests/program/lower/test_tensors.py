"""Indexing and picking in programs."""

import numpy as np
import pytest
import torch
from torch import nn

import pennyweight as pw
from pennyweight.runtime.engine import Engine


class Gather(nn.Module):
    def __init__(self, axis: int) -> None:
        super().__init__()
        self.axis, self.layer = axis, nn.Linear(6, 6)

    def forward(self, x, index):
        return torch.gather(self.layer(x), self.axis, index)


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_gather(axis):
    torch.manual_seed(0)
    model = Gather(axis).eval()
    sizes = [4, 5, 6]
    index = torch.randint(0, sizes[axis], [2 if i == axis % 3 else n for i, n in enumerate(sizes)])
    batch = (torch.randn(4, 5, 6), index)
    converted = pw.quantize(model, [batch], progress=False)
    program = pw.lower(converted, batch)
    inputs = dict(zip(program.inputs, [t.numpy() for t in batch], strict=True))
    want = next(iter(pw.interpret(program, inputs).values()))
    with torch.no_grad():
        np.testing.assert_array_equal(want, converted(*batch).numpy())
    got = next(iter(Engine(program, threads=1).run(inputs).values()))
    np.testing.assert_array_equal(want, got)

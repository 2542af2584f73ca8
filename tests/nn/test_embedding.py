"""nn.Embedding: of a solved table the rows that are looked up alone are decoded, and they are the table's."""

import pytest
import torch
from torch import nn

from pennyweight.pipeline import calibrate, prepare
from pennyweight.qtensor import QTensor
from pennyweight.recipe import Recipe

IDS = torch.tensor([[0, 3, 3], [15, 7, 1]])
SPECS = {  # whether rows of it can be had by themselves
    "int8n[1,*]": True, "int8[*]": True, "uint4[1,8]+z": True, "int4[8]": True, "nf4[1,16]^(uint8[*])": True,
    "int8[*,8]": True, "int8[2,*]": False,
}  # fmt: skip


def calibrated(spec: str) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(16, 32), nn.Linear(32, 4))
    recipe = f'[[rules]]\ntypes = ["Embedding"]\nweight = "{spec}"\n[[passes]]\npass = "calibrate"\n[[passes]]\npass = "solve"\n'
    return calibrate(prepare(model, IDS, Recipe.parse(recipe)), [IDS], progress=False)


@pytest.mark.parametrize("spec", SPECS)
def test_rows_are_those_of_the_table(spec):
    twin = calibrated(spec)[0]
    whole = twin.table()
    assert torch.equal(twin(IDS), nn.functional.embedding(IDS, whole))
    assert not torch.equal(whole, twin.weight)
    q: QTensor = twin.solved["weight"]
    rows = torch.tensor([5, 0, 5])
    taken = q.take(rows)
    assert (taken is not None) == SPECS[spec]
    if taken is not None:
        assert torch.equal(taken.dequantize(), whole[rows])
        assert taken.codes.shape == (3, 32)


@pytest.mark.parametrize("bad", [16, -1])
def test_ids_that_are_none_are_refused(bad):
    with pytest.raises(IndexError):
        calibrated("int8n[1,*]")[0](torch.tensor([bad]))


def test_no_ids_give_no_rows():
    assert calibrated("int8n[1,*]")[0](torch.zeros(2, 0, dtype=torch.long)).shape == (2, 0, 32)

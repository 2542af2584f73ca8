"""Folding computes the same function, and leaves alone what it may not touch."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pennyweight as pw
from pennyweight.recipe import Recipe

FOLD = Recipe.parse(
    '[[rules]]\nweight = "int8n[1,*]"\noptional = true\n\n[[passes]]\npass = "fold_batch_norm"\n\n[[passes]]\npass = "solve"\n'
)
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def lively(model: nn.Module) -> nn.Module:
    torch.manual_seed(4)
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.running_mean.normal_()
            m.running_var.uniform_(0.3, 3)
            if m.affine:
                nn.init.uniform_(m.weight, -1.5, 1.5)
                nn.init.normal_(m.bias)
    return model.double().eval()


def folded(model, x):
    """The prepared model, which computes in float; how many norms are left; what was journalled."""
    prepared = pw.prepare(model, x, FOLD)
    norms = [m for m in prepared.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    with torch.no_grad():
        torch.testing.assert_close(prepared(x), model(x), rtol=1e-9, atol=1e-9)
    return prepared, len(norms), pw.journal(prepared).of("fold")


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_convolutions(dims, transposed, bias, affine):
    kind = getattr(nn, f"Conv{'Transpose' if transposed else ''}{dims}d")
    conv = kind(4, 6, 3, stride=2, groups=2, bias=bias)
    model = lively(nn.Sequential(conv, NORMS[dims](6, affine=affine, eps=0.1), nn.ReLU()))
    kept = {n: p.clone() for n, p in model.named_parameters()}
    _, norms, events = folded(model, torch.randn(2, 4, *[7] * dims).double())
    assert norms == 0
    assert len(events) == 1
    assert all(torch.equal(p, kept[n]) for n, p in model.named_parameters())


def test_linear():
    model = lively(nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7)))
    assert folded(model, torch.randn(3, 5).double())[1] == 0


class Between(nn.Module):
    """A norm that does not follow its convolution alone."""

    def __init__(self, how):
        super().__init__()
        self.conv, self.bn, self.how = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), how

    def forward(self, x):
        y = self.conv(x)
        if self.how == "used twice":
            return self.bn(y) + y
        if self.how == "after a function":
            return self.bn(F.relu(y))
        return self.bn(self.conv(y))  # a convolution called twice


@pytest.mark.parametrize("how", ["used twice", "after a function", "called twice"])
def test_what_must_not_be_folded(how):
    _, norms, events = folded(lively(Between(how)), torch.randn(2, 4, 6, 6).double())
    assert norms == 1
    assert events == []


def test_quantized_networks_fold_too(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU6(), nn.Conv2d(8, 4, 1))
    model = lively(model).float()
    x = torch.randn(4, 3, 9, 9)
    result = pw.quantize(model, [x], progress=False)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in result.modules())
    with torch.no_grad():
        want, got = model(x), result(x)
    assert float((want - got).norm() / want.norm()) < 0.03

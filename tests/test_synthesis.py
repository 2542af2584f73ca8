"""Made-up inputs have the statistics of the norms, and calibrate as real ones do."""

import copy

import pytest
import torch
from torch import nn

import pennyweight as pw


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.na = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8, momentum=None)
        self.b, self.nb = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8, momentum=None)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.nb(self.b(self.na(self.a(x)).relu())).relu()
        return self.head(x.mean((2, 3)))


@pytest.fixture
def net():
    """Trained on smooth inputs of another mean and size than noise: pixels beside each other are alike."""
    model = Net()
    x = nn.functional.interpolate(
        torch.randn(128, 3, 4, 4, generator=torch.Generator().manual_seed(1)), scale_factor=4
    )
    x = 0.5 * x + 0.2
    with torch.no_grad():
        model.train()(x)
    return model.eval(), x


def distance(model, x):
    seen = []
    handle = model.nb.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with torch.no_grad():
        model(x)
    handle.remove()
    mean, std = seen[0].mean((0, 2, 3)), seen[0].std((0, 2, 3))
    return float(((mean - model.nb.running_mean) ** 2 + (std - model.nb.running_var.sqrt()) ** 2).mean())


def test_statistics_are_met(net):
    model, x = net
    before = copy.deepcopy(model.state_dict())
    (made,) = pw.synthesize(model, x[:4], count=32, iterations=150, progress=False)
    assert made.shape == (32, *x.shape[1:])
    noise = torch.randn(made.shape) * x.std() + x.mean()
    assert distance(model, made) < 0.2 * distance(model, noise)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not model.na._forward_pre_hooks


def test_they_calibrate(net):
    model, x = net
    made = pw.synthesize(model, x[:4], count=32, iterations=150, batches=2, progress=False)
    drift = []
    for data in (made, [x[:64]]):
        result = pw.quantize(model, data, "int8", progress=False)
        with torch.no_grad():
            drift.append(float((result(x[64:]) - model(x[64:])).norm() / model(x[64:]).norm()))
    assert drift[0] < 3 * drift[1] + 0.01


def test_seeds(net):
    model, x = net
    make = lambda seed: pw.synthesize(model, x[:4], count=4, iterations=3, seed=seed, progress=False)[0]  # noqa: E731
    assert torch.equal(make(0), make(0))
    assert not torch.equal(make(0), make(1))


def test_refusals():
    with pytest.raises(pw.errors.CalibrationError, match="no batch norm"):
        pw.synthesize(nn.Conv2d(3, 4, 1), torch.randn(1, 3, 4, 4))
    with pytest.raises(pw.errors.CalibrationError, match="floating"):
        pw.synthesize(Net().eval(), torch.zeros(1, 3, 4, 4, dtype=torch.int64))

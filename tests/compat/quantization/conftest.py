"""A tiny trained network with everything in it, and the way it is exported."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pennyweight.compat.export import capture_pre_autograd_graph


class Net(nn.Module):
    """conv-bn-relu, a residual, a pool, dropout, a head: what the patterns of quantizers are about."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8, eps=2e-3, momentum=0.3)
        self.mix = nn.Conv2d(8, 8, 1)
        self.drop = nn.Dropout(0.15)
        self.head = nn.Linear(32, 3)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(x + self.mix(x))
        return self.head(self.drop(F.adaptive_avg_pool2d(x, 2).flatten(1)))


def pictures(count, seed):
    """Noise, brighter in one of three places; and which."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (count,), generator=generator)
    x = torch.randn(count, 1, 6, 6, generator=generator)
    for place, (row, column) in enumerate([(0, 0), (0, 3), (3, 0)]):
        x[labels == place, :, row : row + 3, column : column + 3] += 1.0
    return x, labels


def fit(model, steps, rate, *, seed=0):
    """Train on fresh pictures."""
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9)
    for step in range(steps):
        x, y = pictures(64, seed=1000 * seed + step)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


def accuracy(model):
    x, y = pictures(1000, seed=99_999)
    with torch.no_grad():
        return 100 * float((model(x).argmax(1) == y).float().mean())


@pytest.fixture(scope="session")
def trained():
    torch.manual_seed(0)
    return fit(Net(), 80, 0.05).eval()


@pytest.fixture
def net(trained):
    """A copy of the trained network, in eval mode."""
    return copy.deepcopy(trained)


@pytest.fixture
def exported():
    """Export with an open batch size."""

    def export(model, x=None):
        x = pictures(2, seed=0)[0] if x is None else x
        return capture_pre_autograd_graph(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))

    return export


@pytest.fixture
def batches():
    return [pictures(32, seed=s)[0] for s in (1, 2, 3)]


@pytest.fixture
def task():
    """Training and accuracy on the tiny network's task."""
    return fit, accuracy

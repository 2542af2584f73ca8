"""A small network that has learned something, with its data."""

import pytest
import torch
from torch import nn


class Residual(nn.Module):
    """Convolutions, a batch norm, a sum, pools and a linear layer."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.pool = nn.MaxPool2d(2)
        self.last = nn.Linear(8 * 16, 4)

    def forward(self, x):
        x = self.norm(self.first(x)).relu()
        x = (x + self.second(x)).relu()
        return self.last(self.pool(x).flatten(1))


@pytest.fixture(scope="session")
def quarters():
    """A trained network, inputs and classes: which quarter of the image is bright."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = Residual()
    y = torch.randint(0, 4, (384,), generator=generator)
    x = torch.randn(384, 1, 8, 8, generator=generator) * 0.6
    for i, label in enumerate(y.tolist()):
        x[i, 0, 4 * (label // 2) : 4 * (label // 2) + 4, 4 * (label % 2) : 4 * (label % 2) + 4] += 0.7
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(25):
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval(), x, y

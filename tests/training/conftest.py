"""A small network with everything that training can get wrong: norms with odd settings, dropout, a residual, a pool."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8, eps=3e-3, momentum=0.03)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(8, eps=1e-4, momentum=0.2)
        self.drop = nn.Dropout(0.35)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(y + self.bn2(self.conv2(y)))
        return self.head(self.drop(y.mean((2, 3))))


@pytest.fixture
def small():
    torch.manual_seed(0)
    model = Small()
    with torch.no_grad():  # signs and zeros that folding has to get right
        model.bn1.weight.copy_(torch.tensor([1.0, -0.7, 0.5, 2.0, 0.0, 1.0, -1.3, 0.9]))
        model.bn1.running_mean.normal_()
        model.bn2.running_var.uniform_(0.5, 2)
    return model


@pytest.fixture
def batch():
    torch.manual_seed(1)
    return torch.randn(16, 3, 8, 8), torch.arange(16) % 4

"""The demonstration network: a residual CNN for 28 x 28 grey images, after He et al. 2015, section 4.2."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Two 3 x 3 convolutions with batch norm and a shortcut; a 1 x 1 projection where the shape changes."""

    def __init__(self, cin: int, cout: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(cin, cout, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(cout)
        self.conv2 = nn.Conv2d(cout, cout, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(cout)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or cin != cout:
            self.shortcut = nn.Sequential(nn.Conv2d(cin, cout, 1, stride, bias=False), nn.BatchNorm2d(cout))

    def forward(self, x: Tensor) -> Tensor:
        """[N, cin, H, W] -> [N, cout, H / stride, W / stride]."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + self.shortcut(x))


class FashionNet(nn.Module):
    """Stem and three stages of two residual blocks, global average pooling, one linear layer."""

    def __init__(self, widths: tuple[int, int, int] = (32, 64, 96), classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, widths[0], 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(widths[0])
        blocks: list[nn.Module] = []
        cin = widths[0]
        for stage, width in enumerate(widths):
            for i in range(2):
                blocks.append(Block(cin, width, 2 if stage > 0 and i == 0 else 1))
                cin = width
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Linear(cin, classes)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 1, 28, 28] -> logits [N, classes]."""
        x = F.relu(self.bn(self.stem(x)))
        x = self.blocks(x)
        out: Tensor = self.classifier(x.mean((2, 3)))
        return out


def normalize(images: Tensor) -> Tensor:
    """uint8 [N, 28, 28] -> float32 [N, 1, 28, 28], zero mean and unit variance over the training set."""
    return ((images.float() / 255 - 0.2860) / 0.3530).unsqueeze(1).to(torch.float32)

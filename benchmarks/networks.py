"""The networks that speed is measured on: plain torch modules with random weights, for ours and for every peer.

`network(name)` gives an eval-mode model; `inputs(name, seed, batch)` one batch, as positional tensors.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY, TOKENS = 30_522, 128
UNITS, STEPS = 512, 64


def unit(
    cin: int, cout: int, kernel: int, stride: int = 1, groups: int = 1, act: nn.Module | None = None
) -> nn.Sequential:
    """Convolution, batch norm and, if given, an activation."""
    conv = nn.Conv2d(cin, cout, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(cout), *([act] if act else []))


class Bottleneck(nn.Module):
    """Residual block of ResNet-50. Source: He et al. 2016 (arXiv:1512.03385), the stride on the 3 x 3."""

    def __init__(self, cin: int, mid: int, stride: int) -> None:
        super().__init__()
        self.reduce, self.middle = unit(cin, mid, 1, act=nn.ReLU()), unit(mid, mid, 3, stride, act=nn.ReLU())
        self.expand = unit(mid, 4 * mid, 1)
        same = stride == 1 and cin == 4 * mid
        self.shortcut: nn.Module = nn.Identity() if same else unit(cin, 4 * mid, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.expand(self.middle(self.reduce(x))) + self.shortcut(x))


class ResNet50(nn.Module):
    """[N, 3, 224, 224] -> [N, 1000]; 25.5 M weights, 4.1 G products."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [unit(3, 64, 7, 2, act=nn.ReLU()), nn.MaxPool2d(3, 2, 1)]
        width = 64
        for mid, count, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
            for i in range(count):
                layers.append(Bottleneck(width, mid, stride if i == 0 else 1))
                width = 4 * mid
        self.body, self.head = nn.Sequential(*layers), nn.Linear(width, 1000)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


class BasicBlock(nn.Module):
    """Residual block of ResNet-18. Source: the same."""

    def __init__(self, cin: int, cout: int, stride: int) -> None:
        super().__init__()
        self.first, self.second = unit(cin, cout, 3, stride, act=nn.ReLU()), unit(cout, cout, 3)
        same = stride == 1 and cin == cout
        self.shortcut: nn.Module = nn.Identity() if same else unit(cin, cout, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(self.first(x)) + self.shortcut(x))


class ResNet18(nn.Module):
    """[N, 3, 224, 224] -> [N, 1000]; 11.7 M weights, 1.8 G products."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [unit(3, 64, 7, 2, act=nn.ReLU()), nn.MaxPool2d(3, 2, 1)]
        width = 64
        for cout, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
            layers += [BasicBlock(width, cout, stride), BasicBlock(cout, cout, 1)]
            width = cout
        self.body, self.head = nn.Sequential(*layers), nn.Linear(width, 1000)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


class InvertedResidual(nn.Module):
    """Expand, filter each channel, project. Source: Sandler et al. 2018 (arXiv:1801.04381), table 1."""

    def __init__(self, cin: int, cout: int, stride: int, expand: int) -> None:
        super().__init__()
        mid = cin * expand
        steps = [] if expand == 1 else [unit(cin, mid, 1, act=nn.ReLU6())]
        self.body = nn.Sequential(*steps, unit(mid, mid, 3, stride, mid, nn.ReLU6()), unit(mid, cout, 1))
        self.residual = stride == 1 and cin == cout

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.residual else self.body(x)


class MobileNetV2(nn.Module):
    """[N, 3, 224, 224] -> [N, 1000]; 3.5 M weights, 0.30 G products. Source: the same, table 2."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [unit(3, 32, 3, 2, act=nn.ReLU6())]
        width = 32
        for expand, cout, count, stride in (
            (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1),
        ):  # fmt: skip
            for i in range(count):
                layers.append(InvertedResidual(width, cout, stride if i == 0 else 1, expand))
                width = cout
        self.body = nn.Sequential(*layers, unit(width, 1280, 1, act=nn.ReLU6()))
        self.head = nn.Linear(1280, 1000)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


class Layer(nn.Module):
    """A post-norm encoder layer. Source: Devlin et al. 2019 (arXiv:1810.04805)."""

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out, self.up, self.down = (
            nn.Linear(width, width),
            nn.Linear(width, inner),
            nn.Linear(inner, width),
        )
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (
            f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)
        x = self.first(x + self.out(mixed))
        return self.second(x + self.down(F.gelu(self.up(x))))


class MiniLM(nn.Module):
    """Tokens [N, 128] and mask [N, 128] -> sentence embedding [N, width]: the shape of all-MiniLM-L6."""

    def __init__(self, width: int = 384, depth: int = 6, heads: int = 12) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCABULARY, width), nn.Embedding(512, width)
        self.norm = nn.LayerNorm(width)
        self.layers = nn.ModuleList(Layer(width, heads, 4 * width) for _ in range(depth))

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.norm(self.tokens(ids) + self.places.weight[: ids.shape[1]])
        hidden = (1 - mask[:, None, None, :].to(x.dtype)) * -10_000.0
        for layer in self.layers:
            x = layer(x, hidden)
        weights = mask.unsqueeze(-1).to(x.dtype)
        return F.normalize((x * weights).sum(1) / weights.sum(1))


class Recurrent(nn.Module):
    """[N, 64, 512] -> [N, 512], the last state: two layers of 512 units."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(UNITS, UNITS, num_layers=2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0][:, -1]


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet50": ResNet50,
    "resnet18": ResNet18,
    "mobilenet_v2": MobileNetV2,
    "minilm": MiniLM,
    "bert_base": lambda: MiniLM(768, 12, 12),
    "lstm": Recurrent,
}
ENCODERS = ("minilm", "bert_base")


def network(name: str) -> nn.Module:
    """The network with the random weights of seed 0, in eval mode; batch norms hold statistics of random images."""
    torch.manual_seed(0)
    model = NETWORKS[name]()
    if any(isinstance(m, nn.BatchNorm2d) for m in model.modules()):
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.momentum = None  # the average of all batches
        with torch.no_grad():
            model.train()(torch.randn(4, 3, 224, 224))
    return model.eval()


def inputs(name: str, seed: int, batch: int = 1) -> tuple[Tensor, ...]:
    """A random batch."""
    generator = torch.Generator().manual_seed(seed)
    if name in ENCODERS:
        ids = torch.randint(0, VOCABULARY, (batch, TOKENS), generator=generator)
        return ids, torch.ones(batch, TOKENS, dtype=torch.int64)
    if name == "lstm":
        return (torch.randn(batch, STEPS, UNITS, generator=generator),)
    return (torch.randn(batch, 3, 224, 224, generator=generator),)


def calibration(name: str, count: int = 16, batch: int = 1) -> list[tuple[Tensor, ...]]:
    """Random batches to calibrate on, other than the one that is timed."""
    return [inputs(name, 100 + i, batch) for i in range(count)]

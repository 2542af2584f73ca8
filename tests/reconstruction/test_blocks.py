"""Networks are cut where one value is needed, and blocks are whole where several are."""

import torch
import torch.nn.functional as F
from torch import nn

from pennyweight.pipeline import record
from pennyweight.reconstruction.blocks import Unit, find_units


class Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.a, self.b = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x):
        return F.relu(x + self.b(F.relu(self.a(x))))


class Fork(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.squeeze, self.left, self.right = (nn.Conv2d(width, width, 1) for _ in range(3))

    def forward(self, x):
        x = self.squeeze(x)
        return torch.cat([self.left(x), self.right(x)], 1)


class Encoder(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.q, self.k, self.v, self.out, self.up, self.down = (nn.Linear(width, width) for _ in range(6))

    def forward(self, x, mask):
        x = x + self.out(F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x), mask))
        return x + self.down(F.gelu(self.up(x)))


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers, self.head = nn.ModuleList([Encoder(8), Encoder(8)]), nn.Linear(8, 3)

    def forward(self, x, mask):
        bias = (mask == 0).float() * -1e9
        for layer in self.layers:
            x = layer(x, bias)
        return self.head(x)


def units(model, x, **options):
    paths = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    return find_units(record(model.eval(), x), model, paths, **options)


def test_residual_networks():
    stages = [nn.Sequential(Residual(4), Residual(4)), nn.Sequential(Residual(4))]
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU6(), *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    )
    found = units(model, torch.randn(2, 3, 8, 8))
    assert [u.path for u in found] == ["0", "2.0", "2.1", "3.0", "6"]
    assert found[0] == Unit("0", ("0",), 0.0, 6.0)
    assert found[1] == Unit("2.0", ("2.0.a", "2.0.b"))
    single = units(model, torch.randn(2, 3, 8, 8), whole_blocks=False)
    assert [u.path for u in single] == ["0", "2.0.a", "2.0.b", "2.1.a", "2.1.b", "3.0.a", "3.0.b", "6"]
    assert (single[1].low, single[2].low) == (0.0, -float("inf"))


def test_branches_that_join():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), Fork(4), nn.Conv2d(8, 2, 1))
    assert [u.path for u in units(model, torch.randn(2, 3, 8, 8))] == ["0", "1", "2"]


def test_encoders_with_a_mask_that_all_layers_read():
    found = units(Words(), (torch.randn(2, 5, 8), torch.ones(2, 1, 5)))
    assert [u.path for u in found] == ["layers.0", "layers.1", "head"]
    assert len(found[0].layers) == 6


def test_long_chains_are_single_layers():
    model = nn.Sequential(
        nn.Sequential(*[nn.Linear(4, 4) for _ in range(6)]), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    )
    assert [u.path for u in units(model, torch.randn(2, 4))] == [f"0.{i}" for i in range(6)] + ["1"]


def test_layers_that_run_twice_are_left_out():
    layer = nn.Linear(4, 4)
    assert [u.path for u in units(nn.Sequential(layer, layer, nn.Linear(4, 2)), torch.randn(2, 4))] == ["2"]

"""Exported graphs get their layers back: the same numbers, parameters shared, the same integers afterwards."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import pennyweight as pw
from pennyweight.graph.modularize import modularize

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::DeprecationWarning"
)  # torch.export's own


def exported(model, *args):
    return torch.export.export(model, args, strict=False).module()


def layers(model):
    """Class names of the leaf modules that hold something."""
    leaves = {
        n: m
        for n, m in model.named_modules()
        if n and not list(m.children()) and (m._parameters or m._buffers)
    }
    return {n: type(m).__name__ for n, m in leaves.items()}


class Zoo(nn.Module):
    def __init__(self, dims):
        super().__init__()
        conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
        back = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}[dims]
        norm = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[dims]
        self.a = conv(3, 6, 3, stride=2, padding=1, bias=False)
        self.n = norm(6, eps=1e-3)
        self.b = conv(6, 6, 3, padding=2, dilation=2, groups=3)
        self.c = back(6, 4, 3, stride=2, padding=1, output_padding=1, groups=2)
        self.d = norm(4, affine=False)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        x = self.c(F.relu(self.b(F.relu(self.n(self.a(x))))))
        return self.head(self.d(x).flatten(2).mean(2))


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_layers_come_back(dims):
    torch.manual_seed(0)
    model = Zoo(dims).eval()
    model.n.running_mean.normal_()
    x = torch.randn(2, 3, *[8] * dims)
    back = modularize(exported(model, x))
    assert layers(back) == {
        "a": f"Conv{dims}d", "n": f"BatchNorm{dims}d", "b": f"Conv{dims}d", "c": f"ConvTranspose{dims}d",
        "d": f"BatchNorm{dims}d", "head": "Linear",
    }  # fmt: skip
    with torch.no_grad():
        assert torch.equal(back(x), model(x))
    assert back.a.weight is back.get_parameter("a.weight")
    assert back.a.weight.data_ptr() == model.a.weight.data_ptr()
    assert "self.a(" in back.code
    assert ".weight" not in back.code


def test_the_same_integers_as_the_module_gives(cnn, pictures, tmp_path):
    exported_program = torch.export.export(cnn, (pictures[0],), strict=False)
    torch.export.save(exported_program, tmp_path / "a.pt2")
    back = modularize(torch.export.load(tmp_path / "a.pt2").module())
    a, b = pw.quantize(cnn, pictures), pw.quantize(back, pictures)
    with torch.no_grad():
        assert torch.equal(a(pictures[1]), b(pictures[1]))
    assert [e.site for e in pw.journal(a).of("site")] == [e.site for e in pw.journal(b).of("site")]
    kinds = [[op.kind for op in pw.lower(m, pictures[0])] for m in (a, b)]
    assert kinds[0] == kinds[1]
    assert "requant_add" in kinds[0]


def test_copies_stand_alone(cnn, pictures):
    back = modularize(exported(cnn, pictures[0]))
    other = copy.deepcopy(back)
    with torch.no_grad():
        other.head.weight.zero_()
        assert torch.equal(back(pictures[0]), cnn(pictures[0]))
        assert not torch.equal(other(pictures[0]), cnn(pictures[0]))


def test_any_batch_afterwards(cnn, pictures):
    back = modularize(exported(cnn, pictures[0]))
    with torch.no_grad():
        x = torch.randn(5, 3, 8, 8)
        torch.testing.assert_close(back(x), cnn(x))


def test_a_layer_called_twice_is_one_module():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x):
            return self.a(torch.relu(self.a(x)))

    back = modularize(exported(Twice(), torch.randn(2, 4)))
    assert back.code.count("self.a(") == 2
    assert layers(back) == {"a": "Linear"}


def test_symbolic_traces():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 3, 3, 3))
            self.w = nn.Parameter(torch.randn(5, 4))

        def forward(self, x):
            return F.linear(F.conv2d(x, self.weight, padding=1).mean((2, 3)), self.w)

    model, x = Functional(), torch.randn(2, 3, 6, 6)
    back = modularize(fx.symbolic_trace(model))
    assert sorted(layers(back).values()) == ["Conv2d", "Linear"]
    with torch.no_grad():
        torch.testing.assert_close(back(x), model(x))


def test_computed_weights_and_training_norms_stay_functions():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 4))
            self.n = nn.BatchNorm1d(4, track_running_stats=False)

        def forward(self, x):
            return self.n(F.linear(x, self.w * 2))

    model, x = Odd().eval(), torch.randn(3, 4)
    back = modularize(exported(model, x))
    assert "Linear" not in layers(back).values()
    assert "BatchNorm1d" not in layers(back).values()
    with torch.no_grad():
        torch.testing.assert_close(back(x), model(x))

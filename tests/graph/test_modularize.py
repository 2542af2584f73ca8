"""Exported graphs get their layers back: the same numbers, parameters shared, the same integers afterwards."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import pennyweight as pw
from pennyweight.graph.modularize import modularize

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::DeprecationWarning", "ignore:The tensor attributes"
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


def test_pickles_stand_alone(cnn, pictures):
    back = pickle.loads(pickle.dumps(modularize(exported(cnn, pictures[0]))))
    with torch.no_grad():
        assert torch.equal(back(pictures[0]), cnn(pictures[0]))
        prepared = pw.calibrate(pw.prepare(back, pictures[0]), pictures, progress=False)
        other = pickle.loads(pickle.dumps(prepared))
        assert torch.equal(pw.convert(other)(pictures[1]), pw.convert(prepared)(pictures[1]))


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


class Random(nn.Module):
    """Everything that heeds the mode."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, bias=False)
        self.norm = nn.BatchNorm2d(8, eps=1e-3, momentum=0.03)
        self.drop = nn.Dropout(0.3)
        self.planes = nn.Dropout2d(0.2)
        self.alpha = nn.AlphaDropout(0.1)
        self.slope = nn.RReLU(0.1, 0.4)
        self.table = nn.Embedding(5, 8, padding_idx=2)
        self.mha = nn.MultiheadAttention(8, 2, dropout=0.15, batch_first=True)

    def forward(self, x, ids):
        x = self.planes(self.slope(self.norm(self.conv(x))))
        x = F.dropout(self.alpha(self.drop(x)), 0.25, self.training).mean((2, 3))
        y = x[:, None] + self.table(ids)
        return self.mha(y, y, y, need_weights=False)[0]


@pytest.mark.parametrize("strict", [False, True])
def test_what_heeds_the_mode_comes_back_alive(strict):
    torch.manual_seed(0)
    model = Random().train()
    x, ids = torch.randn(2, 3, 6, 6), torch.randint(0, 5, (2, 4))
    back = modularize(torch.export.export(model, (x, ids), strict=strict).module(), keep_modes=True)
    assert back.norm.training and back.drop.training
    assert (back.norm.eps, back.norm.momentum) == (1e-3, 0.03)
    assert [back.drop.p, back.planes.p, back.alpha.p, back.get_submodule("dropout_1").p] == [
        0.3,
        0.2,
        0.1,
        0.25,
    ]
    assert (back.slope.lower, back.slope.upper) == (0.1, 0.4)
    assert (type(back.planes), back.table.padding_idx) == (nn.Dropout2d, 2)
    assert sorted(n for n, _ in back.mha.named_children()) == [
        "in_proj", "out_proj", "scaled_dot_product_attention",
    ]  # fmt: skip
    back.norm.reset_running_stats()
    model.norm.reset_running_stats()
    for _ in range(3):  # the same random numbers, the same statistics, each batch counted once
        torch.manual_seed(1)
        a = model(x, ids)
        torch.manual_seed(1)
        torch.testing.assert_close(back(x, ids), a)
    model, back = model.eval(), back.eval()
    torch.testing.assert_close(back(x, ids), model(x, ids))
    assert int(back.norm.num_batches_tracked) == 6  # three of each: the exporter shares buffers


def test_a_graph_made_in_eval_mode_trains():
    model, x = (
        nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, momentum=None), nn.Dropout(0.5)).eval(),
        torch.randn(64, 4),
    )
    back = modularize(exported(model, x))
    assert back.get_submodule("1").momentum is None
    before = back(x)
    assert torch.equal(before, model(x))
    back.train()
    assert (back(x) == 0).float().mean() > 0.2
    assert not torch.equal(back.eval()(x), before)  # the statistics moved
    assert int(back.get_submodule("1").num_batches_tracked) == 1


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_layers(kind):
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = kind(8, 6, 2, dropout=0.5, bidirectional=True, batch_first=True)

        def forward(self, x):
            y, state = self.rnn(x)
            return (y, *state) if kind is nn.LSTM else (y, state)

    torch.manual_seed(0)
    model, x = Reader().train(), torch.randn(3, 5, 8)
    back = modularize(exported(model, x), keep_modes=True)
    assert layers(back) == {"rnn": kind.__name__} and back.rnn.dropout == 0.5
    assert not torch.equal(back(x)[0], back(x)[0])
    back, model = back.eval(), model.eval()
    for a, b in zip(back(x), model(x), strict=True):
        assert torch.equal(a, b)
    with torch.no_grad():
        quantized = pw.quantize(back, example=x, recipe="int8-dynamic")
        assert "rnn:weight_ih_l1_reverse" in [e.site for e in pw.journal(quantized).of("site")]
        assert (quantized(x)[0] - model(x)[0]).abs().max() < 0.05


def test_a_place_of_several_layers_keeps_them_all():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.weight = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4, 4))

        def forward(self, x):
            return F.linear(F.linear(x, self.first), self.weight) + self.first[0]

    model, x = nn.Sequential(Pair()), torch.randn(2, 4)
    back = modularize(exported(model, x))
    assert layers(back) == {"0.first_layer": "Linear", "0.layer": "Linear"}
    assert back.get_submodule("0.first_layer").weight is back.get_parameter("0.first")
    torch.testing.assert_close(back(x), model(x))


def test_names_are_those_of_the_recorder(cnn, pictures):
    graph_module = exported(cnn, pictures[0])
    nodes = [n.name for n in graph_module.graph.nodes]
    back = modularize(graph_module)
    recorded = [node.name for node in pw.record(back, (pictures[0],)) if node.kind in ("module", "call")]
    assert [back.names[n] for n in nodes if n in back.names] == recorded
    assert back.names["add"] == ":add/0" and back.names["conv2d"] == "stem"


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

"""Levels of the published sets, their integers, and networks whose weights are on them."""

import math

import pytest
import torch
from torch import nn

import pennyweight as pw
from pennyweight.formats import grids
from pennyweight.formats.codebook import Codebook
from pennyweight.nn.packing import weight_codes
from pennyweight.qtensor import quantize
from pennyweight.ranges import ranges
from pennyweight.solvers import solvers
from pennyweight.spec import QuantSpec
from pennyweight.stats.values import Values

BOOKS = [g for g in grids.values() if isinstance(g, Codebook)]


@pytest.mark.parametrize("book", [b for b in BOOKS if b.multiples], ids=lambda b: b.name)
def test_levels_are_the_multiples_of_the_unit(book):
    assert max(abs(m) for m in book.multiples) <= 127
    exact = [m * book.unit for m in book.multiples]
    codes = torch.arange(len(exact))
    assert book.decode(codes).tolist() == [float(torch.tensor(v)) for v in exact]


def test_published_sets():
    assert grids["pot4"].multiples == (-64, -32, -16, -8, -4, -2, -1, 0, 1, 2, 4, 8, 16, 32, 64)
    # three magnitude bits: Li et al. 2020
    assert grids["apot4"].levels()[7:].tolist() == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1])
    assert grids["seq2"].levels().tolist() == [-1.5, -0.5, 0.5, 1.5]
    roots = grids["sqrt2_3"].levels().tolist()
    assert roots == pytest.approx([-1, -math.sqrt(0.5), -0.5, 0, 0.5, math.sqrt(0.5), 1], abs=2**-15)


def test_gaussian_errors_of_the_published_table():
    """Least mean square errors on a normal distribution: powers of two saturate, sums of them do not."""
    x = torch.randn(1, 200_000, generator=torch.Generator().manual_seed(0))

    def error(name):
        spec = QuantSpec(name)
        rule = ranges["absmean"]() if name == "binary" else ranges["mse"](steps=60)
        params = rule(Values.of(x, spec), spec)
        return float(((quantize(x, spec, params).dequantize() - x) ** 2).mean())

    assert error("pot4") == pytest.approx(0.038, rel=0.05)
    assert error("apot4") == pytest.approx(0.0122, rel=0.05)
    assert error("binary") == pytest.approx(1 - 2 / math.pi, rel=0.02)


def test_binary_scale_is_the_mean_magnitude():
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(1))
    spec = QuantSpec("binary", (1, None))
    scale = ranges["absmean"]()(Values.of(x, spec), spec).scale
    assert torch.allclose(scale[:, 0], x.abs().mean(1))


def test_inq_scale():
    """n1 = floor(log2(4 s / 3)): Zhou et al. 2017."""
    x = torch.tensor([[0.7, -1.4, 0.1, 0.2], [0.1, 0.74, 0.0, 0.2]])
    spec = QuantSpec("pot4", (1, None))
    scale = ranges["power_of_two"](rounding="inq")(Values.of(x, spec), spec).scale
    assert scale[:, 0].tolist() == [1.0, 0.5]  # 4/3 * 1.4 = 1.87, 4/3 * .74 = .987


def test_ternary_threshold():
    x = torch.tensor([[1.0, -0.9, 0.1, 0.2, -0.6, 0.05]])
    spec = QuantSpec("ternary", (1, None))
    q = solvers["twn"](x, spec, ranges["minmax"]())
    assert q.codes.tolist() == [[1, -1, 0, 0, -1, 0]]  # 0.7 * mean|x| = 0.33
    assert float(q.scale) == pytest.approx((1 + 0.9 + 0.6) / 3)


@pytest.mark.parametrize("name", ["binary", "ternary", "seq2", "pot4", "apot4", "apot5"])
def test_networks_with_such_weights_run_on_the_engine(name):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=4), nn.ReLU(), nn.Flatten(),
        nn.Linear(16 * 6 * 6, 10),
    ).eval()  # fmt: skip
    x = torch.randn(16, 3, 8, 8)
    rules = pw.Recipe.preset("int8").with_rules(
        pw.Rule(weight=QuantSpec.parse(f"{name}[1,*]"), input=QuantSpec.parse("uint8[*]+z"))
    )
    quantized = pw.quantize(model, [(x,)], rules, progress=False)
    weights = [q for q in quantized.modules() if hasattr(q, "codes")]
    multiples = set(map(float, getattr(grids[name], "multiples", None) or (-1, 0, 1)))
    assert len(weights) == 3
    for w in weights:
        codes = weight_codes(w.codes, w.table, math.prod(w.shape[1:]))
        assert set(codes.float().unique().tolist()) <= multiples
        small = len(multiples) <= 16  # several codes a byte
        assert (w.table is not None) == small and (w.codes.dtype == torch.uint8) == small
    program = pw.lower(quantized, (x,))
    engine = pw.Session(program).run(x.numpy())
    assert torch.allclose(torch.from_numpy(engine), quantized(x), atol=1e-4)


@pytest.mark.parametrize("name", ["apot4", "pot4", "seq2", "binary", "nf4"])
def test_gradients_of_levels(name):
    """1 inside for values; the level minus the value inside and the level outside for the scale."""
    from pennyweight.gradients.affine import leveled

    spec, grid = QuantSpec(name, (1, None)), grids[name]
    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(2)).requires_grad_()
    scale = torch.tensor([[0.5], [1.0], [2.0]], requires_grad=True)
    y = leveled(x, scale, spec, gain=0.25)
    t = (x / scale).detach()
    level = grid.decode(grid.encode(t))
    assert torch.allclose(y, level * scale)
    y.sum().backward()
    inside = (t >= grid.levels()[0]) & (t <= grid.levels()[-1])
    assert torch.equal(x.grad, inside.float())
    slope = torch.where(inside, level - t, level)
    assert torch.allclose(scale.grad, 0.25 * slope.sum(1, keepdim=True), atol=1e-5)

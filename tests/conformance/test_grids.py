"""Every registered grid keeps the contract of `formats.Grid`; a new file in formats/ is tested by being there."""

import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pennyweight.formats import Grid, grids
from pennyweight.formats.integer import Integer
from pennyweight.qtensor import QParams, quantize
from pennyweight.ranges.minmax import MinMax
from pennyweight.spec import QuantSpec
from pennyweight.stats.values import Values

SMALL = [n for n in grids if grids[n].bits <= 8]
# per tensor, per row, per group, 2-D block
BLOCKS = {"tensor": (), "channel": (1, None), "group": (4,), "square": (2, 4)}


def values_between(grid, count=4096, seed=0):
    """Values inside the grid's range, its levels, the middles between them, and neighbours in float."""
    levels = grid.levels().double()
    picks = torch.randperm(len(levels), generator=torch.Generator().manual_seed(seed))[:512].sort().values
    some = levels[picks]
    middles = (levels[:-1] + levels[1:])[picks[picks < len(levels) - 1]] / 2
    spread = torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    inside = levels[0] + spread * (levels[-1] - levels[0])
    near = torch.cat([middles * (1 - 1e-6), middles * (1 + 1e-6)])
    return torch.cat([some, middles, near, inside]).clamp(levels[0], levels[-1]).float()


@pytest.fixture(params=list(grids))
def grid(request):
    return grids[request.param]


def test_the_entry_is_a_grid_under_its_own_name(grid):
    assert isinstance(grid, Grid)
    assert grids[grid.name] is grid
    assert 1 <= grid.bits <= 16


def test_levels_are_finite_and_ascend(grid):
    levels = grid.levels()
    assert levels.dtype == torch.float32
    assert 2 <= len(levels) <= 2**grid.bits
    assert torch.isfinite(levels).all()
    assert (levels[1:] > levels[:-1]).all()
    assert grid.has_zero == bool((levels == 0).any())
    assert grid.affine == bool((levels.diff() == 1).all() and (levels == levels.round()).all())


def test_every_level_is_its_own_nearest(grid):
    levels = grid.levels()
    codes = grid.encode(levels)
    assert codes.dtype == grid.dtype
    assert torch.equal(grid.decode(codes), levels)
    assert grid.decode(codes).dtype == torch.float32
    assert len(codes.unique()) == len(levels)


def test_codes_fit_the_stored_bits(grid):
    codes = grid.encode(torch.tensor([-math.inf, -1e30, -1.0, 0.0, 1.0, 1e30, math.inf, math.nan])).long()
    low = -(1 << (grid.bits - 1)) if codes.min() < 0 else 0
    assert codes.min() >= low
    assert codes.max() < low + (1 << grid.bits)


def test_encode_is_nearest_and_monotone(grid):
    x = values_between(grid).sort().values
    levels = grid.levels().double()
    decoded = grid.decode(grid.encode(x)).double()
    index = torch.searchsorted(levels, x.double()).clamp(1, len(levels) - 1)
    best = torch.minimum((x.double() - levels[index - 1]).abs(), (levels[index] - x.double()).abs())
    assert torch.equal((decoded - x.double()).abs(), best)  # so at most half the local step
    assert (decoded[1:] >= decoded[:-1]).all()


def test_values_outside_become_the_extremes(grid):
    levels = grid.levels()
    far = torch.tensor([float(levels[-1]) * 2 + 9, math.inf, float(levels[0]) * 2 - 9, -math.inf])
    high, low = float(levels[-1]), float(levels[0])
    assert grid.decode(grid.encode(far)).tolist() == [high, high, low, low]


def test_nan_becomes_the_lowest_level(grid):
    assert float(grid.decode(grid.encode(torch.tensor([math.nan])))) == float(grid.levels()[0])


def test_ties_go_to_even_integers():
    for grid in (g for g in grids.values() if isinstance(g, Integer) and g.bits <= 8):
        levels = grid.levels()
        middles = (levels[:-1] + levels[1:]) / 2
        assert (
            grid.decode(grid.encode(middles)) % 2 == 0
        ).all() or grid.qmin % 2  # ends of narrow ranges clip
        inner = middles[1:-1]
        assert (grid.decode(grid.encode(inner)) % 2 == 0).all()


@pytest.mark.parametrize("name", [n for n in grids if grids[n].affine and grids[n].has_zero])
@pytest.mark.parametrize("kind", ["int", "none"])
def test_zero_is_exact_inside_a_mixed_block(name, kind):
    spec = QuantSpec(name, (8,), kind)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(64, 8, generator=generator) * 10 ** (torch.rand(64, 1, generator=generator) * 8 - 4)
    x += torch.randn(64, 1, generator=generator)  # ranges that do not straddle zero as well
    x[torch.rand(64, 8, generator=generator) < 0.3] = 0.0
    back = quantize(x, spec, MinMax()(Values.of(x, spec), spec)).dequantize()
    assert (back[x == 0] == 0).all()


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
def test_blocks_round_as_if_alone(name, block):
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    spec = QuantSpec(name, block)
    q = quantize(x, spec, MinMax()(Values.of(x, spec), spec))
    scales = q.scales()
    assert scales.shape == spec.scale_shape((4, 8))
    rows, columns = (n // s for n, s in zip((4, 8), scales.shape, strict=True))
    whole = QuantSpec(name)
    back = q.dequantize()
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            here = (slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns))
            part = x[here].contiguous()
            alone = quantize(part, whole, MinMax()(Values.of(part, whole), whole))
            assert torch.equal(alone.dequantize(), back[here])
            assert torch.equal(alone.codes, q.codes[here])


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types_round_like_their_float32_values(name, dtype):
    spec = QuantSpec(name, (4,))
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(2)).to(dtype)
    wide = x.float()
    q = quantize(x, spec, MinMax()(Values.of(x, spec), spec))
    same = quantize(wide, spec, MinMax()(Values.of(wide, spec), spec))
    assert torch.equal(q.codes, same.codes)
    assert torch.equal(q.scales(), same.scales())


@pytest.mark.parametrize("name", SMALL)
def test_strides_do_not_matter(name):
    spec = QuantSpec(name, (1, 4))
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(4)).t()
    assert not x.is_contiguous()
    q = quantize(x, spec, MinMax()(Values.of(x, spec), spec))
    plain = quantize(x.contiguous(), spec, MinMax()(Values.of(x.contiguous(), spec), spec))
    assert torch.equal(q.codes, plain.codes)
    assert torch.equal(q.dequantize(), plain.dequantize())


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize(
    ("shape", "block"), [((0,), ()), ((0, 4), (1, None)), ((3, 0), (1, None)), ((0, 8), (4,)), ((), ())]
)
def test_empty_and_single_values(name, shape, block):
    spec = QuantSpec(name, block)
    x = torch.full(shape, 0.75)
    q = quantize(x, spec, MinMax()(Values.of(x, spec), spec))
    assert q.codes.shape == x.shape
    assert q.dequantize().shape == x.shape
    if x.numel():
        assert float(q.dequantize()) == pytest.approx(0.75, rel=0.51)


@pytest.mark.parametrize("name", list(grids))
def test_an_all_zero_block_has_scale_one(name):
    spec = QuantSpec(name, (4,))
    x = torch.tensor([[0.0, 0, 0, 0, 1, -2, 3, 0.5]])
    params = MinMax()(Values.of(x, spec), spec)
    assert float(params.scale[0, 0]) == 1.0
    assert 0 < float(params.scale[0, 1]) < math.inf
    if grids[name].has_zero:
        assert (quantize(x, spec, params).dequantize()[0, :4] == 0).all()


@pytest.mark.parametrize("name", list(grids))
def test_a_qtensor_survives_pickle(name):
    spec = QuantSpec(name, (4,))
    x = torch.randn(2, 8, generator=torch.Generator().manual_seed(5))
    q = quantize(x, spec, MinMax()(Values.of(x, spec), spec))
    again = pickle.loads(pickle.dumps(q))
    assert again.spec == spec
    assert torch.equal(again.dequantize(), q.dequantize())
    assert again.nbytes == q.nbytes == (x.numel() * grids[name].bits + 7) // 8 + 4 * 4


@pytest.mark.parametrize("name", SMALL)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_error_is_at_most_half_a_step(name, data):
    """|x' - x| <= half the widest step times the scale, for every finite float32 block and range by extremes."""
    numbers = st.floats(-(2.0**60), 2.0**60, width=32, allow_subnormal=False)
    x = torch.tensor([data.draw(st.lists(numbers, min_size=1, max_size=12))])
    spec = QuantSpec(name, (1, None))
    params = MinMax()(Values.of(x, spec), spec)
    q = quantize(x, spec, params)
    levels = grids[name].levels()
    half = float(levels.diff().max()) / 2
    inside = (x >= float(levels[0]) * params.scale) & (x <= float(levels[-1]) * params.scale)
    if levels[0] < 0:  # the extremes of the block are within the grid's reach
        assert (x.abs() <= levels.abs().max() * params.scale * (1 + 1e-6)).all()
    error = (q.dequantize().double() - x.double()).abs()
    bound = half * float(params.scale) * (1 + 1e-5) + float(x.abs().max()) * 1e-6
    assert (error[inside] <= bound).all()


@pytest.mark.parametrize("name", [n for n in SMALL if grids[n].affine])
def test_integer_zero_points_reach_every_code(name):
    """With any zero point, each level decodes from its own code: `(q - z) * s` and back."""
    grid = grids[name]
    levels = grid.levels()
    spec = QuantSpec(name, (), "int")
    for zero in levels[:: max(1, len(levels) // 7)]:
        params = QParams(torch.full((1,), 0.125), zero.reshape(1))
        x = (levels - zero) * 0.125
        q = quantize(x, spec, params)
        assert torch.equal(q.codes, levels.to(grid.dtype))
        assert torch.equal(q.dequantize(), x)

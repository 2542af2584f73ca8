"""Small floats: all codes against the published tables, PyTorch's casts, blocks with shared scales."""

import math

import pytest
import torch

from pennyweight.errors import SpecError
from pennyweight.formats import grids
from pennyweight.formats.minifloat import Minifloat, minifloat
from pennyweight.qtensor import quantize
from pennyweight.ranges import ranges
from pennyweight.ranges.minmax import MinMax
from pennyweight.spec import QuantSpec
from pennyweight.stats.values import Values

FLOATS = [g for g in grids.values() if isinstance(g, Minifloat)]
CASTS = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}

# Open Compute Project: FP8 1.0, tables 1 and 2; MX 1.0, tables 3 to 5: max, least normal, greatest and least subnormal
LIMITS = {
    "fp8_e4m3": (448.0, 2.0**-6, 0.875 * 2.0**-6, 2.0**-9),
    "fp8_e5m2": (57344.0, 2.0**-14, 0.75 * 2.0**-14, 2.0**-16),
    "fp6_e3m2": (28.0, 0.25, 0.1875, 0.0625),
    "fp6_e2m3": (7.5, 1.0, 0.875, 0.125),
    "fp4_e2m1": (6.0, 1.0, 0.5, 0.5),
}


def fields(code, exponent, mantissa):
    return (
        code >> (exponent + mantissa),
        (code >> mantissa) & ((1 << exponent) - 1),
        code & ((1 << mantissa) - 1),
    )


@pytest.mark.parametrize("grid", FLOATS, ids=lambda g: g.name)
def test_every_code_is_what_its_fields_say(grid):
    greatest, normal, most, least = LIMITS[grid.name]
    decoded = grid.decode(torch.arange(1 << grid.bits)).tolist()
    finite = [v for v in decoded if math.isfinite(v)]
    assert max(finite) == greatest
    assert decoded[1 << grid.mantissa] == normal
    assert decoded[(1 << grid.mantissa) - 1] == most
    assert decoded[1] == least
    for code, value in enumerate(decoded):
        sign, e, m = fields(code, grid.exponent, grid.mantissa)
        fraction = m / (1 << grid.mantissa)
        want = (-1) ** sign * (
            2.0 ** (1 - grid.bias) * fraction if e == 0 else 2.0 ** (e - grid.bias) * (1 + fraction)
        )
        if grid.name == "fp8_e4m3" and code & 127 == 127:
            assert math.isnan(value)
        elif grid.name == "fp8_e5m2" and e == 31:
            assert math.isnan(value) if m else value == math.copysign(math.inf, -sign or 1)
        else:
            assert value == want
            assert math.copysign(1, value) == math.copysign(1, want)


def test_all_of_fp4():
    levels = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    assert grids["fp4_e2m1"].decode(torch.arange(16)).tolist() == levels + [-v for v in levels]


@pytest.mark.parametrize("name", CASTS)
def test_codes_decode_as_pytorch_reads_them(name):
    patterns = torch.arange(256, dtype=torch.uint8)
    ours, theirs = grids[name].decode(patterns), patterns.view(CASTS[name]).float()
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert torch.equal(ours.nan_to_num(7.0).view(torch.int32), theirs.nan_to_num(7.0).view(torch.int32))


@pytest.mark.parametrize("grid", FLOATS, ids=lambda g: g.name)
def test_every_finite_code_encodes_to_itself(grid):
    codes = torch.arange(1 << grid.bits)
    values = grid.decode(codes)
    keep = values.isfinite()
    assert torch.equal(grid.encode(values[keep]).long(), codes[keep])  # the sign of zero is kept


def every_sixteenth_exponent_and_more():
    """All float32 whose lower 12 bits are zero, their neighbours, all middles between levels, and noise."""
    top = torch.arange(1 << 20, dtype=torch.int64) << 12
    near = torch.cat([top, top + 1, top - 1])
    noise = torch.randint(0, 1 << 32, (2_000_000,), generator=torch.Generator().manual_seed(0))
    patterns = torch.cat([near, noise]) & 0xFFFFFFFF
    x = torch.where(patterns >= 1 << 31, patterns - (1 << 32), patterns).to(torch.int32).view(torch.float32)
    return x[x.isfinite()]


@pytest.mark.parametrize("name", CASTS)
def test_encode_is_pytorchs_cast_of_the_clamped_value(name):
    grid = grids[name]
    levels = grid.levels().double()
    middles = ((levels[1:] + levels[:-1]) / 2).float()
    x = torch.cat([every_sixteenth_exponent_and_more(), middles, levels.float()])
    greatest = LIMITS[name][0]
    theirs = x.clamp(-greatest, greatest).to(CASTS[name]).view(torch.uint8)
    assert len(x) > 4_000_000
    assert torch.equal(grid.encode(x), theirs)


@pytest.mark.parametrize("grid", FLOATS, ids=lambda g: g.name)
def test_ties_go_to_the_even_mantissa(grid):
    levels = grid.levels().double()
    codes = grid.encode((levels[1:] + levels[:-1]) / 2)
    assert (codes % 2 == 0).all()


def test_infinity_saturates_and_a_zero_point_is_refused():
    grid = grids["fp8_e4m3"]
    assert grid.decode(grid.encode(torch.tensor([math.inf, -math.inf, 1e9]))).tolist() == [
        448.0,
        -448.0,
        448.0,
    ]
    with pytest.raises(SpecError, match="zero point"):
        grid.encode(torch.ones(2), torch.zeros(2))


def test_formats_of_other_fields():
    plain = minifloat("e3m4", 3, 4, 3, subnormals=False)
    assert plain.values[len(plain.values) // 2] == 0.0
    assert min(v for v in plain.values if v > 0) == 2.0**-2  # without subnormals, 1.0000 * 2^(1 - bias)
    x = torch.tensor([2.0**-3, 2.0**-3 * 1.01, 2.0**-2, 0.0])
    assert plain.decode(plain.encode(x)).tolist() == [0.0, 0.25, 0.25, 0.0]
    with pytest.raises(SpecError):
        minifloat("too wide", 8, 4, 127)
    with pytest.raises(SpecError, match="float32"):
        minifloat("too great", 7, 0, -100)


# ------------------------------------------------------------------------------------------------ shared scales


def test_e8m0_is_every_power_of_two():
    patterns = torch.arange(255, dtype=torch.uint8)
    assert torch.equal(patterns.view(torch.float8_e8m0fnu).double(), torch.exp2(patterns.double() - 127))
    x = torch.exp2(torch.arange(-99, 120).double()).float()
    spec = QuantSpec.parse("int8n[1,*]^e8m0")
    rows = x[:, None] * torch.tensor([[127.0, 1.0]])
    q = quantize(rows, spec, MinMax()(Values.of(rows, spec), spec))
    stored = q.scale.view(torch.uint8).reshape(-1).long()
    assert torch.equal(torch.exp2(stored - 127.0), q.scales().reshape(-1).double())
    assert torch.equal(q.scales()[:, 0], x)
    assert q.nbytes == rows.numel() + len(rows)
    assert str(spec) == "int8n[1,*]^e8m0"
    assert spec.bits_per_element((4, 32)) == 8 + 8 / 32


def micro(x, text, rounding="floor"):
    spec = QuantSpec.parse(text)
    return quantize(x, spec, ranges["mx"](rounding)(Values.of(x, spec), spec))


def test_shared_exponents_of_every_rounding():
    """Greatest magnitudes 5 and 7 on fp4 (greatest level 6 = 1.5 * 2^2)."""
    x = torch.zeros(2, 32)
    x[:, 3] = torch.tensor([5.0, 7.0])
    x[:, 9] = 0.75
    found = {
        r: micro(x, "fp4_e2m1[32]^e8m0", r).scales()[:, 0].tolist()
        for r in ("floor", "ceil", "rceil", "even")
    }
    assert found == {"floor": [1.0, 1.0], "ceil": [2.0, 2.0], "rceil": [1.0, 2.0], "even": [1.0, 2.0]}
    with pytest.raises(SpecError, match="rceil"):
        micro(x, "fp4_e2m1[32]^e8m0", "rciel")


@pytest.mark.parametrize("name", ["fp8_e4m3", "fp8_e5m2", "fp6_e3m2", "fp6_e2m3", "fp4_e2m1", "int8"])
def test_mx_blocks_follow_the_specification(name):
    """X = 2^(floor(log2 amax) - emax), P_i = Q(V_i / X); written out in float64."""
    emax = {"fp8_e4m3": 8, "fp8_e5m2": 15, "fp6_e3m2": 4, "fp6_e2m3": 2, "fp4_e2m1": 2, "int8": 6}[name]
    g = torch.Generator().manual_seed(1)
    x = torch.randn(64, 96, generator=g) * torch.exp2(torch.randint(-60, 60, (64, 1), generator=g).float())
    q = micro(x, f"{name}[32]^e8m0")
    blocks = x.double().reshape(64, 3, 32)
    scale = torch.exp2(torch.floor(torch.log2(blocks.abs().amax(-1))) - emax)
    assert torch.equal(q.scales().double(), scale)
    levels = grids[name].levels().double()
    scaled = (blocks / scale[..., None]).clamp(levels[0], levels[-1])
    best = (scaled[..., None] - levels).abs().amin(-1) if len(levels) < 300 else None
    error = (q.dequantize().double().reshape(64, 3, 32) / scale[..., None] - scaled).abs()
    assert torch.equal(error, best)


def test_rounding_up_never_saturates():
    x = torch.randn(256, 32, generator=torch.Generator().manual_seed(2))
    q = micro(x, "fp4_e2m1[32]^e8m0", "rceil")
    assert (x.abs() <= 6 * q.scales()).all()
    floor = micro(x, "fp4_e2m1[32]^e8m0")
    assert (x.abs() > 6 * floor.scales()).any()


def test_nvfp4_is_two_levels_of_scales():
    """g = amax_T / (448 * 6), sb = E4M3(amax_b / 6 / g), data E2M1(x / (sb g))."""
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(3)) * torch.rand(8, 1)
    spec = QuantSpec.parse("fp4_e2m1[16]^(fp8_e4m3[*])")
    q = quantize(x, spec, MinMax()(Values.of(x, spec), spec))
    blocks = x.double().reshape(8, 4, 16)
    overall = x.abs().max().double() / (448 * 6)
    scales = (blocks.abs().amax(-1) / 6 / overall).float().clamp(max=448).to(torch.float8_e4m3fn)
    assert torch.equal(q.scale.codes, scales.view(torch.uint8))
    whole = scales.double() * overall.float().double()
    want = grids["fp4_e2m1"].encode((blocks / whole[..., None]).float())
    assert (
        float((want.reshape(8, 64) == q.codes).float().mean()) > 0.999
    )  # products of scales are rounded once more
    assert spec.bits_per_element((8, 64)) == pytest.approx(4 + 8 / 16 + 32 / 512)


def test_scales_of_scales_cost_little():
    """NF4 with 8-bit scales keeps the error of NF4 with float32 ones within 2 %."""
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(4))

    def error(text):
        spec = QuantSpec.parse(text)
        q = quantize(x, spec, MinMax()(Values.of(x, spec), spec))
        return float(((q.dequantize() - x) ** 2).mean())

    assert error("nf4[64]^(uint8[*])") < error("nf4[64]") * 1.02

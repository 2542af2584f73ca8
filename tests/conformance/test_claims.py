"""Published and derived figures of number formats on normal data: mean squared errors relative to the signal's power.

Sources: the levels' own papers, named in `formats/`; clipping tables of Banner et al. 2019 (arXiv:1810.05723).
"""

import math

import pytest
import torch

from pennyweight.formats import grids
from pennyweight.qtensor import QParams, quantize
from pennyweight.ranges import ranges
from pennyweight.ranges.aciq import best_alpha
from pennyweight.solvers import solvers
from pennyweight.spec import QuantSpec
from pennyweight.stats.values import Values


@pytest.fixture(scope="module")
def normal():
    return torch.randn(512, 512, generator=torch.Generator().manual_seed(0))


def error(x, text, rule="minmax", **options):
    """Relative squared error of x under a spec and a range rule."""
    spec = QuantSpec.parse(text)
    q = quantize(x, spec, ranges[rule](**options)(Values.of(x, spec), spec))
    return float(((q.dequantize() - x) ** 2).mean() / (x**2).mean())


def least_error(x, name):
    """The least over scales of the whole tensor, by golden section: the error has one minimum on smooth data."""
    spec = QuantSpec(name)

    def at(scale):
        q = quantize(x, spec, QParams(torch.full((1, 1), scale)))
        return float(((q.dequantize() - x) ** 2).mean() / (x**2).mean())

    top = float(grids[name].levels().abs().max())
    low, high = 0.3 / top, 5.0 / top
    ratio = (math.sqrt(5) - 1) / 2
    for _ in range(22):
        a, b = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, b) if at(a) < at(b) else (a, high)
    return at((low + high) / 2)


@pytest.mark.parametrize(
    ("name", "want"),
    [("seq2", 0.1188), ("seq3", 0.0374), ("int2", 0.1496), ("int3", 0.0407), ("int4", 0.0119), ("int5", 0.0035),
     ("int2n", 0.1908), ("int3n", 0.0471), ("int4n", 0.0129), ("apot4", 0.0122), ("pot3", 0.048), ("pot4", 0.038),
     ("pot5", 0.0379)],
)  # fmt: skip
def test_least_error_of_a_grid_on_normal_data(normal, name, want):
    """A bit is worth 6.02 dB on uniform grids; powers of two saturate, sums of them do not."""
    assert least_error(normal[:256], name) == pytest.approx(want, rel=0.02)


def test_the_search_finds_the_optimum_of_uniform_grids(normal):
    """Within 0.1 dB of 9.25 (half-odd), 13.9, 19.3 dB: what the range rule `mse` reaches."""
    found = {n: -10 * math.log10(error(normal, f"{n}[*]", "mse")) for n in ("seq2", "int3", "int4")}
    assert found == pytest.approx({"seq2": 9.25, "int3": 13.9, "int4": 19.27}, abs=0.1)


@pytest.mark.parametrize(
    ("text", "want", "rule"),
    [("nf4[32]", 0.0076, "minmax"), ("nf4[64]", 0.0085, "minmax"), ("fp4_e2m1[32]", 0.0102, "minmax"),
     ("fp4_e2m1[32]^e8m0", 0.0133, "mx"), ("fp4_e2m1[16]^(fp8_e4m3[*])", 0.0090, "minmax"),
     ("fp8_e4m3[*]", 7.0e-4, "minmax"), ("int2[32]", 0.1321, "signed"), ("int3[32]", 0.0305, "signed"),
     ("int4[32]", 0.0074, "signed"), ("int2[128]", 0.1818, "signed")],
)  # fmt: skip
def test_errors_of_blocks(normal, text, want, rule):
    assert error(normal, text, rule) == pytest.approx(want, rel=0.03)


def test_rounding_up_shared_exponents_ties_with_rounding_down_on_normal_data(normal):
    up = error(normal, "fp4_e2m1[32]^e8m0", "mx", rounding="rceil")
    assert up == pytest.approx(error(normal, "fp4_e2m1[32]^e8m0", "mx"), rel=0.03)


def test_a_signed_scale_pays_at_two_and_three_bits(normal):
    """Of symmetric storage in groups of 32: .224 to .132 and .0416 to .0305, without any search."""
    for bits, plain in ((2, 0.2238), (3, 0.0416)):
        half = 2 ** (bits - 1) - 0.5
        spec = QuantSpec(f"int{bits}", (32,))
        scale = Values.of(normal, spec)
        absmax = QParams((torch.maximum(-scale.lo, scale.hi) / half).float())
        unsigned = float(
            ((quantize(normal, spec, absmax).dequantize() - normal) ** 2).mean() / (normal**2).mean()
        )
        assert unsigned == pytest.approx(plain, rel=0.02)
        assert error(normal, f"int{bits}[32]", "signed") < 0.75 * unsigned


def test_a_searched_clip_helps_most_at_few_bits(normal):
    """Groups of 128: 2 bits .304 to .147 and 4 bits .0124 to .0103 with plain scales; signed ones start lower."""
    gain = {
        b: error(normal, f"int{b}[128]", "signed") / error(normal, f"int{b}[128]", "mse") for b in (2, 4, 8)
    }
    assert gain[2] > 1.25 > gain[4] > 1.05 > gain[8] >= 1.0


def test_ternary_thresholds(normal):
    """TWN .1917, BitNet's mean magnitude .2635, without training."""
    spec = QuantSpec("ternary")
    twn = solvers["twn"](normal, spec, ranges["minmax"]())
    assert float(((twn.dequantize() - normal) ** 2).mean()) == pytest.approx(0.1917, rel=0.02)
    assert error(normal, "ternary[*]", "absmean") == pytest.approx(0.2635, rel=0.02)


def test_the_half_odd_grid_beats_the_full_range_of_two_bits(normal):
    assert least_error(normal[:128], "seq2") < 0.82 * least_error(normal[:128], "int2")


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_clips_of_the_analytic_rule(bits):
    """alpha / b of Laplace data 2.83, 3.89, 5.03, 9.89; alpha / sigma of normal data 1.71, 2.15, 2.55, 3.92."""
    laplace, gauss = {2: (2.83, 1.71), 3: (3.89, 2.15), 4: (5.03, 2.55), 8: (9.89, 3.92)}[bits]
    assert best_alpha(bits, "laplace") == pytest.approx(laplace, abs=0.02)
    assert best_alpha(bits, "gauss") == pytest.approx(gauss, abs=0.02)

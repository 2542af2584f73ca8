"""Every registered range rule, on weights block by block and on streamed activations."""

import dataclasses
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pennyweight.errors import NonFinite, PennyweightError, SpecError
from pennyweight.formats import grids
from pennyweight.qtensor import QParams, quantize
from pennyweight.ranges import params_of_range, ranges
from pennyweight.ranges.minmax import MinMax
from pennyweight.ranges.mse import MSE, range_error
from pennyweight.spec import QuantSpec
from pennyweight.stats import stats
from pennyweight.stats.values import Values

NAMES = list(ranges)
SPECS = [
    "int8n[*]",
    "int8[*]",
    "uint8[*]+z",
    "int8[*]+z",
    "uint8[*]",
    "int4[*]",
    "uint4[*]+z",
    "int4[*]+zf",
    "int2[*]",
]
FREE = {"absmean", "power_of_two", "mx", "fixed_point"}  # the scale is not that of a range within the data's
CLIPPING = {"mean_minmax", "moving_minmax", "percentile", "mse", "entropy", "aciq"}  # may cut values off


def data(kind):
    g = torch.Generator().manual_seed(len(kind))
    normal = torch.randn(16, 256, generator=g)
    return {
        "gauss": normal,
        "relu": normal.relu(),
        "laplace": normal.sign() * -torch.rand(16, 256, generator=g).log(),
        "shifted": normal * 0.1 + 3,
        "outlier": torch.cat([normal.reshape(-1), torch.tensor([80.0])]).reshape(1, -1),
        "negative": -normal.abs(),
        "constant": torch.full((16, 4), 0.7),
        "one": torch.tensor([[-0.3]]),
        "zeros": torch.zeros(16, 4),
        "mostly zero": torch.cat([torch.zeros(1, 4000), torch.full((1, 2), 5.0)], 1),
        "tiny": normal * 1e-36,
        "huge": normal.clamp(-3, 3) * 1e37,
    }[kind]


KINDS = ["gauss", "relu", "laplace", "shifted", "outlier", "negative", "constant", "one", "zeros", "mostly zero",
         "tiny", "huge"]  # fmt: skip


def streamed(rule, x):
    statistic = stats[rule.needs]()
    for batch in x.split(4):
        statistic.update(batch)
    return statistic


def applied(name, kind, text, source):
    """Parameters of a rule, or None where it says that it does not fit."""
    rule, spec, x = ranges[name](), QuantSpec.parse(text), data(kind)
    statistic = streamed(rule, x) if source == "stream" else Values.of(x, spec)
    try:
        return rule(statistic, spec), spec, x
    except SpecError:
        return None


@pytest.fixture(scope="module", params=[(n, s) for n in NAMES for s in SPECS], ids="-".join)
def found(request):
    """All that one rule finds for one spec: [(kind of data, parameters, spec, data)]."""
    name, text = request.param
    every = ((kind, applied(name, kind, text, source)) for kind in KINDS for source in ("stream", "values"))
    return [(name, kind, *some) for kind, some in every if some is not None]


def test_parameters_are_usable(found):
    for name, kind, params, spec, x in found:
        where = f"{name} {kind} {spec}"
        grid = grids[spec.grid]
        assert params.scale.dtype == torch.float32, where
        assert torch.isfinite(params.scale).all(), where
        assert torch.isfinite(1.0 / params.scale).all(), where
        assert (params.scale != 0).all(), where
        assert name in ("signed", "mse") or (params.scale > 0).all(), where
        assert (params.zero is None) == (spec.zero == "none"), where
        if spec.zero == "int":
            assert torch.equal(params.zero, params.zero.round()), where
            assert grid.levels()[0] <= params.zero.min(), where
            assert params.zero.max() <= grid.levels()[-1], where
        zero = None if params.zero is None else params.zero.reshape(1, 1)
        back = quantize(x, spec, QParams(params.scale.reshape(1, 1), zero)).dequantize()
        assert torch.isfinite(back).all(), where
        if spec.zero != "float":
            assert (back[x == 0] == 0).all(), where
        if kind == "zeros":
            assert float(params.scale) == 1.0, where


def test_clipping_never_widens(found):
    for name, kind, params, spec, x in found:
        if name in FREE:
            continue
        widest = MinMax()(Values.of(x, spec), spec).scale.reshape(())
        assert float(params.scale.abs()) <= float(widest) * (1 + 1e-6), f"{name} {kind} {spec}"


@pytest.mark.parametrize("name", NAMES)
def test_rules_are_deterministic_and_plain_values(name):
    for kind in KINDS:
        for text in SPECS:
            first, second = applied(name, kind, text, "stream"), applied(name, kind, text, "stream")
            assert (first is None) == (second is None)
            if first is not None:
                assert torch.equal(first[0].scale, second[0].scale)
    rule = ranges[name]()
    assert dataclasses.is_dataclass(rule)
    assert pickle.loads(pickle.dumps(rule)) == rule
    with pytest.raises(dataclasses.FrozenInstanceError):
        rule.anything = 1
    assert rule.needs in stats


@pytest.mark.parametrize("name", NAMES)
def test_each_rule_serves_some_spec(name):
    served = [s for s in SPECS if applied(name, "gauss", s, "stream")]
    assert served, f"{name} refuses everything"
    if name in CLIPPING:
        assert "uint8[*]+z" in served


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("text", ["int8[*]", "uint8[*]+z"])
def test_nan_and_infinity_are_refused(name, bad, text):
    spec, x = QuantSpec.parse(text), data("gauss").clone()
    x[3, 5] = bad
    rule = ranges[name]()
    with pytest.raises((NonFinite, SpecError)) as caught:
        rule(Values.of(x, spec), spec)
    assert caught.type is NonFinite or applied(name, "gauss", text, "values") is None
    with pytest.raises((NonFinite, SpecError)) as caught:
        rule(streamed(rule, x), spec)
    assert caught.type is NonFinite or applied(name, "gauss", text, "stream") is None


@pytest.mark.parametrize("name", NAMES)
def test_nothing_seen_is_an_error(name):
    rule = ranges[name]()
    for text in ("int8[*]", "uint8[*]+z"):
        with pytest.raises(PennyweightError):
            rule(stats[rule.needs](), QuantSpec.parse(text))


@pytest.mark.parametrize(
    "text", ["int8n[1,*]", "int4[32]", "int4[32]+z", "int4[32]+zf", "uint8[2,4]+z", "int3[64]"]
)
@pytest.mark.parametrize("kind", ["gauss", "relu", "laplace", "shifted", "negative", "mostly zero"])
@pytest.mark.parametrize("power", [1.0, 2.0, 2.4, 4.0])
def test_mse_is_never_worse_than_extremes_in_its_own_objective(text, kind, power):
    spec, x = QuantSpec.parse(text), data(kind)
    x = x.reshape(-1)[: x.numel() // 128 * 128].reshape(-1, 128)
    if x.shape[0] % 2:
        x = torch.cat([x, x[:1]])
    seen = Values.of(x, spec)
    values, weights = seen.support()
    least = range_error(values, weights, MSE(power=power)(seen, spec), spec, power)
    naive = range_error(values, weights, MinMax()(seen, spec), spec, power)
    assert (least <= naive).all()
    if kind == "gauss" and spec.grid != "int8n":
        assert float(least.sum()) < 0.99 * float(naive.sum())  # and better on the whole


@pytest.mark.parametrize("kind", ["gauss", "relu", "laplace", "shifted"])
def test_percentile_one_is_the_whole_range(kind):
    spec = QuantSpec.parse("uint8[*]+z")
    whole = MinMax()(streamed(MinMax(), data(kind)), spec)
    rule = ranges["percentile"](p=1.0)
    assert torch.equal(rule(streamed(rule, data(kind)), spec).scale, whole.scale)


@pytest.mark.parametrize("p", [0.9, 0.99, 0.999])
def test_percentile_cuts_its_share(p):
    x = torch.randn(200, 500, generator=torch.Generator().manual_seed(0))
    spec = QuantSpec.parse("uint8[*]+z")
    for seen in (streamed(ranges["percentile"](), x), Values.of(x, spec)):
        params = ranges["percentile"](p=p)(seen, spec)
        low = float((0 - params.zero) * params.scale)
        high = float((255 - params.zero) * params.scale)
        tolerance = (1 - p) * 0.1 + 2e-4  # bins are 1/4096 of the range wide, steps 1/255
        assert float((x > high).double().mean()) == pytest.approx(1 - p, abs=tolerance + 0.01 * (p < 0.95))
        assert float((x < low).double().mean()) == pytest.approx(1 - p, abs=tolerance + 0.01 * (p < 0.95))


def test_mean_minmax_shrugs_at_one_odd_sample():
    x = torch.randn(64, 100, generator=torch.Generator().manual_seed(0))
    x[7] *= 100
    rule, spec = ranges["mean_minmax"](), QuantSpec.parse("int8n[*]")
    assert float(rule(streamed(rule, x), spec).scale) < 0.1 * float(
        MinMax()(streamed(MinMax(), x), spec).scale
    )


@settings(max_examples=300, deadline=None)
@given(
    st.floats(-(2.0**100), 2.0**100, width=32), st.floats(0, 2.0**100, width=32),
    st.sampled_from([s for s in SPECS if not s.endswith("zf")]),
)  # fmt: skip
def test_any_range_keeps_zero_and_reaches_both_ends(lo, width, text):
    spec = QuantSpec.parse(text)
    low, high = torch.tensor([lo]), torch.tensor([lo]) + torch.tensor([width])
    params = params_of_range(low, high, spec)
    grid = grids[spec.grid]
    zero = 0.0 if params.zero is None else params.zero
    decoded = (grid.levels() - zero) * params.scale
    assert (decoded == 0).any()
    if spec.grid.startswith("uint") and spec.zero == "none":
        low = low.clamp(min=0.0)  # no codes for the negative side
    step = float(params.scale)
    if max(abs(float(low)), abs(float(high))) > 1e-25:
        assert float(decoded.min()) <= min(float(low), 0.0) + 0.5001 * step
        assert float(decoded.max()) >= max(float(high), 0.0) - 0.5001 * step

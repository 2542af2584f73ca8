"""Every registered statistic: merging, order, memory, state, other processes. A new file in stats/ is tested by being there."""

import inspect
import pickle
import subprocess
import sys

import pytest
import torch

from pennyweight.errors import NonFinite
from pennyweight.stats import Distribution, Statistic, stats

EXACT = {"minmax", "histogram"}  # promise the same bits in any order
ORDERED = {"moving_minmax"}  # promise to depend on the order of batches
NAMES = list(stats)


def batches(seed):
    """Five batches of four channels, of growing scale and shifting mean."""
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(n, 4, generator=g) * 3**k + k - 2 for k, n in enumerate((5, 1, 16, 8, 3))]


def filled(name, tensors):
    statistic = stats[name]()
    for x in tensors:
        statistic.update(x)
    return statistic


def merged(*parts):
    """A fresh statistic of everything in `parts`, which stay as they are."""
    whole = type(parts[0]).from_state(parts[0].state())
    for part in parts[1:]:
        whole.merge(part)
    return whole


def assert_same(a, b, *, exact):
    left, right = a.state(), b.state()
    assert left.keys() == right.keys()
    for key, value in left.items():
        assert value.shape == right[key].shape
        if exact or not value.is_floating_point():
            assert torch.equal(value, right[key]), key
        else:
            torch.testing.assert_close(value, right[key], rtol=1e-6, atol=1e-9)


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


def test_the_entry_is_a_statistic(name):
    empty = stats[name]()
    assert isinstance(empty, Statistic)
    assert empty.count == 0


def test_extremes_and_count_describe_the_data(name):
    data = batches(0)
    statistic = filled(name, data)
    everything = torch.cat([x.reshape(-1) for x in data])
    assert statistic.count == everything.numel()
    assert float(everything.min()) <= float(statistic.lo.min()) <= float(statistic.hi.max())
    assert float(statistic.hi.max()) <= float(everything.max())


def test_an_empty_tensor_changes_nothing(name):
    statistic = filled(name, batches(1))
    before = merged(statistic)
    statistic.update(torch.zeros(0, 4))
    assert_same(statistic, before, exact=True)
    fresh = stats[name]()
    fresh.update(torch.zeros(0, 4))
    assert fresh.count == 0


def test_merging_an_empty_one_changes_nothing(name):
    statistic = filled(name, batches(1))
    assert_same(merged(statistic, stats[name]()), statistic, exact=True)
    assert_same(merged(stats[name](), statistic), statistic, exact=True)


def test_merging_leaves_the_other_as_it_was(name):
    a, b = filled(name, batches(2)), filled(name, [x * 50 for x in batches(3)])
    before = merged(b)
    a.merge(b)
    assert_same(b, before, exact=True)
    b.update(torch.full((2, 4), 1e6))
    assert float(a.hi.max()) < 1e6  # nothing is shared afterwards


def test_merging_commutes(name):
    a, b = filled(name, batches(4)), filled(name, [x * 7 - 3 for x in batches(5)])
    assert_same(merged(a, b), merged(b, a), exact=name in EXACT)


def test_merging_associates(name):
    a, b, c = (filled(name, [x * s for x in batches(s)]) for s in (1, 20, 3))
    assert_same(merged(merged(a, b), c), merged(a, merged(b, c)), exact=name in EXACT)


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ORDERED])
def test_merging_equals_seeing_everything_and_the_order_is_free(name):
    data = batches(6)
    whole = filled(name, data)
    assert_same(filled(name, data[::-1]), whole, exact=name in EXACT)
    assert_same(merged(filled(name, data[:2]), filled(name, data[2:])), whole, exact=name in EXACT)


@pytest.mark.parametrize("name", sorted(EXACT))
def test_cutting_batches_otherwise_gives_the_same_bits(name):
    data = torch.cat(batches(7))
    assert_same(filled(name, data.split(1)), filled(name, [data]), exact=True)


def test_the_ordered_ones_do_depend_on_the_order():
    assert set(NAMES) >= ORDERED | EXACT
    for name in ORDERED:
        data = batches(8)
        assert not torch.equal(filled(name, data).hi, filled(name, data[::-1]).hi)


def test_memory_is_bounded(name):
    def size(statistic):
        return sum(v.numel() * v.element_size() for v in statistic.state().values())

    generator = torch.Generator().manual_seed(0)
    few = filled(name, [torch.randn(8, 4, generator=generator)])
    many = filled(name, [torch.randn(8, 4, generator=generator) * 1.7**k for k in range(60)])
    assert size(many) == size(few) < 1 << 17


def test_state_and_pickle_round_trip(name):
    statistic = filled(name, batches(9))
    state = statistic.state()
    assert all(isinstance(v, torch.Tensor) for v in state.values())
    for again in (stats[name].from_state(state), pickle.loads(pickle.dumps(statistic))):
        assert again.count == statistic.count
        assert_same(again, statistic, exact=True)
        again.update(batches(10)[2])
        further = merged(statistic)
        further.update(batches(10)[2])
        assert_same(again, further, exact=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types_count_as_their_float32_values(name, dtype):
    data = [x.to(dtype) for x in batches(11)]
    assert_same(filled(name, data), filled(name, [x.float() for x in data]), exact=name != "moments")


def test_strides_do_not_matter(name):
    x = torch.randn(6, 8, 4, generator=torch.Generator().manual_seed(1)).permute(0, 2, 1)
    assert not x.is_contiguous()
    assert_same(filled(name, [x]), filled(name, [x.contiguous()]), exact=True)


def test_no_graph_is_kept(name):
    x = torch.randn(4, 4, requires_grad=True)
    statistic = filled(name, [x * 2])
    assert not any(v.requires_grad for v in statistic.state().values())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_number_shows(name, bad):
    """A statistic refuses it or shows it in its extremes, where range rules refuse it."""
    x = torch.randn(4, 4)
    x[1, 2] = bad
    try:
        statistic = filled(name, [x, torch.randn(4, 4)])
    except NonFinite:
        return
    assert not bool(torch.isfinite(statistic.lo).all() & torch.isfinite(statistic.hi).all())


@pytest.mark.parametrize("name", [n for n in NAMES if hasattr(stats[n], "support")])
def test_a_distribution_holds_every_value(name):
    data = batches(12)
    statistic = filled(name, data)
    assert isinstance(statistic, Distribution)
    values, weights = statistic.support()
    assert values.shape == weights.shape
    assert float(weights.sum()) == statistic.count
    assert (values[1:] >= values[:-1]).all()
    assert float(statistic.lo) <= float(values.min()) <= float(values.max()) <= float(statistic.hi)
    everything = torch.cat([x.reshape(-1) for x in data])
    mean = float((values * weights).sum() / weights.sum())
    assert mean == pytest.approx(float(everything.mean()), abs=float(everything.std()) / 100)


def test_another_process_takes_part_through_its_state(tmp_path):
    """What torch.distributed ranks do: each fills its own, states travel as plain tensors, the sum is exact."""
    code = f"""
import sys, torch
from safetensors.torch import save_file
from pennyweight.stats import stats
{inspect.getsource(batches)}
for name in stats:
    statistic = stats[name]()
    for x in batches(21):
        statistic.update(x)
    save_file({{k: v.contiguous() for k, v in statistic.state().items()}}, f"{{sys.argv[1]}}/{{name}}.safetensors")
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=120)
    from safetensors.torch import load_file

    for name in NAMES:
        here = filled(name, batches(20))
        there = stats[name].from_state(load_file(tmp_path / f"{name}.safetensors"))
        both = merged(here, there)
        if name in ORDERED:
            assert both.count == here.count + there.count
        else:
            assert_same(both, filled(name, batches(20) + batches(21)), exact=name in EXACT)

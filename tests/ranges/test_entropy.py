"""The entropy clip against a literal transcription of the published procedure, bin by bin in plain numpy."""

import time

import numpy as np
import pytest
import torch

from pennyweight.errors import SpecError
from pennyweight.ranges.entropy import Entropy, best_clip
from pennyweight.spec import QuantSpec
from pennyweight.stats.histogram import Histogram
from pennyweight.stats.values import Values


def entropy_of(p, q):
    """Relative entropy of two unnormalised distributions, infinite where q is 0 and p is not."""
    p, q = p / p.sum(), q / q.sum()
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(p == 0, 0.0, p * np.log(p / q))
    return terms.sum()


def literal_best_clip(counts, levels, start=128, stride=1, kill_spike=True):
    """The documented steps, as slow as they read."""
    bins = np.array(counts, np.float64)
    if kill_spike:
        bins[0] = bins[1]
    divergences, tries = [], []
    for i in range(start, len(bins) + 1, stride):
        reference = bins[:i].copy()
        reference[i - 1] += bins[i:].sum()  # outliers in the last bin
        level = np.digitize(np.arange(i), np.linspace(0, i, levels + 1)) - 1
        total, nonzero = np.zeros(levels), np.zeros(levels)
        for j in range(i):
            if bins[j] != 0:
                total[level[j]] += bins[j]
                nonzero[level[j]] += 1
        candidate = np.zeros(i)
        for j in range(i):
            if bins[j] != 0:
                candidate[j] = total[level[j]] / nonzero[level[j]]
        divergences.append(entropy_of(reference, candidate) if candidate.any() else np.inf)
        tries.append(i)
    last = len(divergences) - 1 - int(np.argmin(divergences[::-1]))
    return tries[last]


def histograms():
    rng = np.random.default_rng(0)
    half_normal = np.abs(rng.standard_normal(200_000))
    relu = np.maximum(rng.standard_normal(100_000), 0)
    laplace = rng.laplace(size=100_000)
    heavy = np.abs(rng.standard_t(3, 50_000))
    sparse = np.zeros(600)
    sparse[rng.integers(0, 600, 60)] = rng.integers(1, 1000, 60)
    gap = np.zeros(700)
    gap[:200], gap[690:] = rng.integers(1, 900, 200), 3
    packed = np.zeros(500)
    packed[:100] = rng.integers(1, 50, 100)  # no outlier beyond any clip: ties at zero
    return {
        "half-normal": np.histogram(half_normal, 2048)[0],
        "relu": np.histogram(relu, 1024)[0],
        "laplace": np.histogram(np.abs(laplace), 900)[0],
        "student": np.histogram(heavy, 800)[0],
        "uniform": rng.integers(0, 100, 512),
        "geometric": rng.geometric(0.01, 400) * (rng.random(400) < 0.7),
        "sparse": sparse,
        "gap": gap,
        "packed": packed,
        "short": rng.integers(1, 9, 130),
    }


@pytest.mark.parametrize("kind", sorted(histograms()))
@pytest.mark.parametrize("levels", [128, 256])
def test_the_same_index_as_the_published_procedure(kind, levels):
    counts = histograms()[kind]
    stride = 1 if len(counts) <= 1024 else 3
    wanted = literal_best_clip(counts, levels, stride=stride)
    assert best_clip(torch.from_numpy(counts), levels, stride=stride) == wanted


@pytest.mark.parametrize("seed", range(12))
def test_random_histograms(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(129, 420))
    counts = rng.poisson(rng.gamma(0.3, 40, n) * np.linspace(1, 0.02, n))
    levels = int(rng.choice([8, 64, 128, 256]))
    assert best_clip(torch.from_numpy(counts), levels) == literal_best_clip(counts, levels)


def test_the_half_normal_of_2048_bins_exactly():
    counts = histograms()["half-normal"]
    assert best_clip(torch.from_numpy(counts), 128) == literal_best_clip(counts, 128)


def test_without_killing_the_spike_of_zeros_a_relu_clips_elsewhere():
    counts = histograms()["relu"]
    with_spike = literal_best_clip(counts, 128, stride=2, kill_spike=False)
    assert with_spike != literal_best_clip(counts, 128, stride=2)
    assert best_clip(torch.from_numpy(counts), 128, stride=2) != with_spike


def test_2048_bins_take_well_under_a_second():
    counts = torch.from_numpy(histograms()["half-normal"])
    start = time.process_time()
    best_clip(counts, 128)
    assert time.process_time() - start < 1.0


def test_the_rule_clips_at_the_edge():
    u = torch.rand(100_000, generator=torch.Generator().manual_seed(0))
    x = u.log() * torch.tensor([1.0, -1.0]).repeat(50_000)  # Laplace
    histogram = Histogram()
    histogram.update(x)
    counts, edges = histogram.magnitudes(2048)
    amax = float(edges[best_clip(counts, 128)])
    assert amax < float(x.abs().max())
    assert float(Entropy()(histogram, QuantSpec.parse("int8n[*]")).scale) == pytest.approx(amax / 127)
    assert int(counts.sum()) == x.numel()
    assert float(edges[-1]) >= float(x.abs().max())


def test_it_is_for_whole_tensors():
    with pytest.raises(SpecError, match="histograms of whole tensors"):
        Entropy()(Values.of(torch.randn(4, 8), QuantSpec.parse("int8n[1,*]")), QuantSpec.parse("int8n[1,*]"))

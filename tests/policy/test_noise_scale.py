from __future__ import annotations

import math
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import worlds
from hybrid_magic.policy import noise_scale


def gradient(noise, n, dims, rng):
    """The mean gradient of n samples: |G|^2 = 1, trace of the per-sample covariance = noise."""
    sigma, mean = (noise / dims / n) ** 0.5, dims**-0.5
    return [rng.gauss(mean, sigma) for _ in range(dims)]


def sq_norm(vector):
    return sum(x * x for x in vector)


def probe(state, rng, noise, n_small, n_large, dims=64):
    """One probe of gradients with |G|^2 = 1 and a covariance of trace `noise`."""
    first = gradient(noise, n_small, dims, rng)
    rest = gradient(noise, n_large - n_small, dims, rng)
    share = n_small / n_large
    large = [a * share + b * (1 - share) for a, b in zip(first, rest, strict=True)]
    return noise_scale.update(state, sq_norm(first), sq_norm(large), n_small, n_large)


def estimate(seed, noise=200.0, probes=96, sizes=((16, 32),)):
    rng = random.Random(seed)
    state = noise_scale.init()
    for i in range(probes):
        state = probe(state, rng, noise, *sizes[i % len(sizes)])
    return noise_scale.estimate(state)


@pytest.mark.parametrize("sizes", [((16, 32),), ((8, 64),), ((4, 32), (32, 64), (48, 96))])
def test_both_terms_are_unbiased_whatever_sizes_are_mixed(sizes):
    found = [estimate(seed, sizes=sizes) for seed in range(100)]
    # 100 runs: the mean lies within four of its own standard errors in all but 1 of 16,000 cases
    for values, truth in (
        ([one.grad_sq for one in found], 1.0),
        ([one.variance for one in found], 200.0),
    ):
        error = statistics.stdev(values) / 10
        assert abs(statistics.mean(values) - truth) < 4 * error
        assert error < 0.05 * truth


def test_the_standard_error_is_what_runs_spread_by():
    found = [estimate(seed) for seed in range(100)]
    spread = statistics.stdev(one.grad_sq for one in found)
    claimed = statistics.mean(one.grad_sq_error for one in found)
    assert 0.8 < claimed / spread < 1.25  # blocks of 12: a tenth low at most, sampling a tenth more


def test_the_lower_end_lies_below_the_truth_most_of_the_time_and_not_far_below():
    found = [estimate(seed).noise_scale for seed in range(100)]
    assert sum(one < 200 for one in found) > 75
    assert statistics.median(found) > 100


def test_there_is_no_estimate_before_the_warm_up():
    assert estimate(0, probes=noise_scale.WARMUP - 1) is None
    assert estimate(0, probes=noise_scale.WARMUP) is not None


def test_only_the_last_window_counts_so_the_estimate_follows_the_run():
    rng, state = random.Random(0), noise_scale.init()
    for _ in range(200):
        state = probe(state, rng, 50.0, 16, 32)
    for _ in range(noise_scale.WINDOW):
        state = probe(state, rng, 800.0, 64, 128)
    found = noise_scale.estimate(state)
    assert found is not None
    assert found.probes == noise_scale.WINDOW
    assert found.variance == pytest.approx(800, rel=0.2)


def followed(noises, seed=0):
    """The state after probes of gradients of these noise scales, and how often a fall was seen."""
    rng, state, falls = random.Random(seed), noise_scale.init(), 0
    for noise in noises:
        large = worlds.sq_norm(noise / 128, 64, rng, mean=1.0)
        apart = worlds.sq_norm(noise / 128, 64, rng)  # noise / 64 - noise / 128
        state = noise_scale.update(state, large + apart, large, 64, 128)
        kept = noise_scale.since_fall(state)
        falls += kept is not state
        state = kept
    return state, falls


def test_a_tenfold_fall_is_noticed_within_thirty_probes_and_what_was_before_forgotten():
    for seed in range(5):
        state, falls = followed([2000.0] * 96 + [200.0] * 30, seed)
        found = noise_scale.estimate(state)
        assert falls >= 1
        assert found is not None
        assert found.middle == pytest.approx(200, rel=0.75)  # two dozen probes spread by a quarter


@pytest.mark.parametrize("noises", [[500.0] * 200, [200.0] * 96 + [2000.0] * 96])
def test_neither_chance_nor_a_rise_is_taken_for_a_fall(noises):
    assert sum(followed(noises, seed)[1] for seed in range(5)) == 0


def test_a_negative_gradient_estimate_gives_a_finite_lower_end_and_no_middle():
    state = noise_scale.init()
    for i in range(48):
        state = noise_scale.update(state, 3.0 + 0.1 * (i % 5), 1.0 + 0.01 * (i % 7), 16, 32)
    found = noise_scale.estimate(state)
    assert found is not None
    assert found.grad_sq < 0
    assert found.middle is None
    assert math.isfinite(found.noise_scale)
    assert found.noise_scale > 0


@given(bad=st.sampled_from([math.nan, math.inf, -math.inf]), which=st.integers(0, 1))
def test_a_probe_that_is_not_finite_is_left_out(bad, which):
    state = noise_scale.update(noise_scale.init(), 2.0, 1.0, 16, 32)
    values = [2.0, 1.0]
    values[which] = bad
    assert noise_scale.update(state, *values, 16, 32) is state


@pytest.mark.parametrize(("small", "large"), [(32, 32), (0, 32), (33, 32)])
def test_sizes_that_compare_nothing_are_refused(small, large):
    with pytest.raises(ValueError, match="wanted 0 < n_small < n_large"):
        noise_scale.update(noise_scale.init(), 1.0, 1.0, small, large)


def test_no_gradient_and_no_noise_is_no_estimate():
    state = noise_scale.init()
    for _ in range(48):
        state = noise_scale.update(state, 0.0, 0.0, 16, 32)
    assert noise_scale.estimate(state) is None

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrid_magic.policy import growth
from hybrid_magic.policy.noise_scale import NoiseEstimate

batches = st.integers(1, 4096)
noises = st.floats(0, 1e6)


def noise_of(lower, middle=None):
    return NoiseEstimate(
        noise_scale=lower,
        middle=lower * 1.3 if middle is None else middle,
        grad_sq=1.0,
        grad_sq_error=0.3,
        variance=lower * 1.3,
        variance_error=0.0,
        probes=96,
    )


def standing(batch, **changed):
    values = {
        "batch": batch,
        "base": 32,
        "max_batch": 512,
        "factor": 1.5,
        "least": 0.9,
        "may_grow": True,
        "fits": lambda wanted: True,
    }
    return growth.Standing(**{**values, **changed})


def flat(batch):  # a step costs nearly the same at twice the batch
    return 1.0 + 0.001 * batch


@given(base=batches, ratio=st.integers(1, 64), noise=noises)
def test_efficiency_falls_from_one_as_the_batch_grows(base, ratio, noise):
    assert growth.efficiency(base, base, noise) == 1 or noise + base == 0
    assert growth.efficiency(base * ratio, base, noise) <= 1


@given(base=batches, noise=noises, least=st.floats(0.05, 1))
def test_the_largest_efficient_batch_has_the_least_efficiency(base, noise, least):
    batch = growth.largest_efficient(base, noise, least)
    assert (noise + base) / (noise + batch) == pytest.approx(least, rel=1e-6)


@given(
    rule=st.sampled_from(["auto", "none", "linear", "sqrt"]),
    family=st.sampled_from(["sgd", "adam"]),
    base=batches,
    noise=st.none() | noises,
)
def test_the_learning_rate_at_the_base_batch_is_the_persons_own(rule, family, base, noise):
    assert growth.lr_factor(rule, family, base, base, noise) == 1.0


@given(base=batches, ratio=st.floats(1, 64), noise=noises)
def test_adascale_lies_between_one_and_linear(base, ratio, noise):
    batch = math.ceil(base * ratio)
    gain = growth.lr_factor("auto", "sgd", batch, base, noise)
    assert 1 - 1e-9 <= gain <= batch / base + 1e-9


def test_learning_rate_rules_are_the_papers():
    assert growth.lr_factor("linear", "adam", 128, 32, None) == 4
    assert growth.lr_factor("sqrt", "sgd", 128, 32, None) == 2
    assert growth.lr_factor("auto", "adam", 128, 32, 500.0) == 2
    assert growth.lr_factor("auto", "sgd", 128, 32, 96.0) == pytest.approx(4 * 128 / 224)
    assert growth.lr_factor("auto", "sgd", 128, 32, None) == 2  # nothing measured: the root
    assert growth.lr_factor("none", "sgd", 128, 32, 96.0) == 1


def test_a_ramp_is_as_long_as_the_growth_asks_for():
    assert growth.ramp_steps(1.0, 1.0) == 0
    assert growth.ramp_steps(1.0, 1.5) == 20
    assert growth.ramp_steps(1.0, 9.0) == growth.SPACING
    assert growth.ramp_steps(2.0, 1.0) == 0


@given(batch=batches, factor=st.floats(1, 4), ceiling=st.floats(1, 1e5))
def test_growth_stays_within_its_factor_and_ceiling(batch, factor, ceiling):
    wanted = growth.grown(batch, factor, ceiling)
    if wanted is not None:
        assert batch < wanted <= max(batch + 1, batch * factor + 1e-6)
        assert wanted <= ceiling
        assert wanted <= 16 or wanted % 8 == 0


def test_no_batch_is_a_dead_end_of_rounding():
    assert all(growth.grown(batch, 1.5, 10_000) for batch in range(1, 400))


def test_goodput_grows_with_a_reason_a_student_can_read():
    move = growth.by_goodput(standing(64), noise_of(512.0), flat)
    assert move is not None
    assert move.batch == 88  # efficiency 0.9 allows (512 + 32) / 0.9 - 512 = 92
    assert move.reason.startswith("noise scale 512 samples, +2")
    assert move.reason.endswith("% goodput")


@pytest.mark.parametrize(
    ("why", "changed", "noise", "seconds"),
    [
        ("the run is not stable", {"may_grow": False}, 5000.0, flat),
        ("at the largest batch", {"max_batch": 64}, 5000.0, flat),
        ("efficiency would fall below the bound", {}, 300.0, flat),
        ("a step costs in proportion", {}, 5000.0, lambda batch: 1.0 * batch),
        ("it cannot be cut as the model needs", {"fits": lambda wanted: False}, 5000.0, flat),
    ],
)
def test_goodput_stays_when(why, changed, noise, seconds):
    assert growth.by_goodput(standing(64), noise_of(5000.0), flat) is not None
    assert growth.by_goodput(standing(64, **changed), noise_of(noise), seconds) is None


def test_a_small_gain_now_counts_when_it_leads_somewhere():
    seconds = lambda batch: 4.0 + batch
    move = growth.by_goodput(standing(64), noise_of(50_000.0), seconds)
    assert move is not None
    assert "on the way to 512" in move.reason


def test_where_no_time_is_known_one_growth_is_tried_to_learn_it():
    move = growth.by_goodput(standing(32), noise_of(5000.0), lambda batch: None)
    assert move is not None
    assert "to learn" in move.reason


def test_a_batch_shrinks_when_its_efficiency_fell_clearly_below_the_bound_only():
    assert growth.by_goodput(standing(256), noise_of(500.0, middle=1300.0), flat) is None
    move = growth.by_goodput(standing(256), noise_of(100.0, middle=400.0), flat)
    assert move is not None
    assert move.batch == 80  # the largest of efficiency 0.9
    assert "efficiency 66 %, wanted 90 %" in move.reason
    assert growth.by_goodput(standing(32), noise_of(0.0, middle=0.0), flat) is None


def test_zero_efficiency_leaves_it_to_goodput_alone():
    move = growth.by_goodput(standing(64, least=0.0), noise_of(300.0), flat)
    assert move is not None
    assert move.batch == 96


def test_stability_grows_by_the_factor_within_the_wanted_efficiency():
    def move(now, noise):
        return growth.by_stability(now, noise, flat, 0.1)

    grown = move(standing(64), noise_of(5000.0))
    assert grown is not None
    assert grown.batch == 96
    assert move(standing(64, may_grow=False), noise_of(5000.0)) is None
    assert move(standing(64), noise_of(10.0, middle=2000.0)) is None
    assert move(standing(64), None) is None
    assert move(standing(64, least=0.0), None) is not None


def test_stability_does_not_grow_to_a_batch_that_memory_would_cut_into_slower_pieces():
    pieces_of_80 = lambda batch: -(-batch // 80) * 10.0 + 0.001 * batch
    move = growth.by_stability(standing(64), noise_of(5000.0), pieces_of_80, 0.1)
    assert move is not None
    assert move.batch == 80
    assert growth.by_stability(standing(80), noise_of(5000.0), pieces_of_80, 0.1) is None


def test_goodput_takes_the_best_of_the_next_batches_not_the_largest():
    pieces_of_80 = lambda batch: -(-batch // 80) * 10.0 + 0.001 * batch
    move = growth.by_goodput(standing(64), noise_of(5000.0), pieces_of_80)
    assert move is not None
    assert move.batch == 80


def health(losses, norms=()):
    found = growth.Health()
    for at in range(0, len(losses), growth.BLOCK):
        found = growth.update(found, losses[at : at + growth.BLOCK], norms)
    return found


def test_the_spread_is_small_for_a_steady_fall_and_large_for_a_swing():
    fall = [2.0 - 0.05 * i for i in range(32)]
    swing = [2.0 if i // 8 % 2 else 1.0 for i in range(32)]
    rise = [1.0 + 0.1 * i for i in range(32)]
    assert growth.spread(health(fall)) == pytest.approx(0, abs=1e-9)
    assert growth.spread(health(swing)) > 0.3
    assert growth.spread(health(rise)) > 0.3


def test_a_loss_near_zero_does_not_look_wild():
    small = [2.0] * 8 + [0.01 if i // 8 % 2 else 0.02 for i in range(32)]
    assert growth.spread(health(small)) < 0.1


def test_the_spread_needs_a_full_curve_and_is_forgotten_after_a_change():
    full = health([1.0] * 32)
    assert growth.spread(health([1.0] * 24)) is None
    assert growth.spread(growth.forget_losses(full)) is None


def test_the_norm_limit_follows_the_median_and_waits_for_enough_norms():
    assert growth.norm_limit(health([1.0] * 8, [1.0] * 8)) == math.inf
    assert growth.norm_limit(health([1.0] * 32, [1.0] * 7 + [50.0])) == growth.FAR_ABOVE

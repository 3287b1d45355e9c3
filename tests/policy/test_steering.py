from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.worlds import GIB, World, simulate
from hybrid_magic.policy import growth, steering
from hybrid_magic.policy.facts import Settings, StepFacts

ADAPTIVE = Settings(base=32, max_batch=512, budget_bytes=8 * GIB)
FIXED = dataclasses.replace(ADAPTIVE, batch="fixed")
LAUNCH_BOUND = World(overhead_s=0.01, noise=3000, noise_end=3000)


def facts(step, sizes, **changed):
    return StepFacts(step=step, sizes=sizes, loss=1.0, grad_norm=1.0, **changed)


def grown(**changed):
    """A state that has grown above the base batch, and the step it is at."""
    settings = dataclasses.replace(ADAPTIVE, **changed)
    trace = simulate(LAUNCH_BOUND, settings, 300)
    assert trace.state.batch >= 4 * settings.base
    assert trace.ooms == 0
    return trace.state, 300


def run(state, steps, first=0, **changed):
    changes = []
    for step in range(first, first + steps):
        plan, state = steering.plan(state)
        state, found = steering.observe(state, facts(step, plan.sizes, **changed))
        changes += found
    return state, changes


@given(remaining=st.lists(st.integers(1, 200), min_size=1, max_size=30))
def test_a_fixed_batch_with_its_micro_batch_pinned_is_the_loaders_own_cut(remaining):
    state = steering.init(dataclasses.replace(FIXED, micro=32))
    for left in remaining:
        plan, state = steering.plan(state, left)
        assert plan == steering.StepPlan((min(32, left),), probe=False)
        state, changes = steering.observe(state, facts(0, plan.sizes))
        assert changes == ()
        assert steering.lr_factor(state, sum(plan.sizes)) == 1.0


@given(
    base=st.integers(1, 300),
    batch=st.sampled_from(["adaptive", "fixed"]) | st.integers(1, 600),
    accum=st.none() | st.integers(1, 9),
    micro=st.none() | st.integers(1, 80),
    most=st.none() | st.integers(1, 300),
    norms=st.booleans(),
    lefts=st.lists(st.integers(1, 700), min_size=1, max_size=12),
)
def test_plans_never_ask_for_more_than_is_left_nor_for_nothing(
    base, batch, accum, micro, most, norms, lefts
):
    settings = Settings(
        base=base, max_batch=16 * base, batch=batch, accum=accum, micro=micro, micro_most=most
    )
    state = steering.init(dataclasses.replace(settings, batch_statistics=norms))
    for step, left in enumerate(lefts):
        while left:
            plan, state = steering.plan(state, left)
            assert 1 <= sum(plan.sizes) <= left
            assert min(plan.sizes) >= 1
            if most is not None and not norms:
                assert max(plan.sizes) <= most
            left -= sum(plan.sizes)
            state, _ = steering.observe(state, facts(step, plan.sizes))


@pytest.mark.parametrize(("n", "most"), [(3, 2), (13, 4), (1, 1), (9, 3)])
def test_the_sample_left_over_in_a_first_step_never_makes_a_size_too_large(n, most):
    state = steering.init(Settings(base=16, max_batch=16, micro_most=most))
    sizes = steering.plan(state, n)[0].sizes
    assert sum(sizes) == n
    assert max(sizes) <= most


def test_the_first_step_rises_and_the_steps_planned_ahead_stay_at_its_largest_size():
    state = steering.init(ADAPTIVE)
    first, state = steering.plan(state)
    second, state = steering.plan(state)
    assert first.sizes == (2, 4, 8, 2, 4, 8, 4)
    assert max(second.sizes) == 8
    assert not first.probe


def test_batch_statistics_are_never_measured_by_cutting_a_step():
    state = steering.init(dataclasses.replace(ADAPTIVE, batch_statistics=True))
    probes = 0
    for step in range(100):
        plan, state = steering.plan(state)
        assert plan.sizes == (32,)
        probes += plan.probe
        state, _ = steering.observe(state, facts(step, plan.sizes))
    assert probes == 12  # one in 8, as no times tell what they cost


def probed_at(state, steps, *, micro_s, norms_s=0.0):
    """Run `steps` steps and return the plans of those that measured the noise, with their steps."""
    found = {}
    for step in range(steps):
        plan, state = steering.plan(state)
        times = tuple(micro_s(size) for size in plan.sizes)
        seconds = 0.001 + norms_s * plan.probe
        noise = (33.0, 1.0, 16, 32) if plan.probe else None
        if plan.probe:
            found[step] = plan.sizes
        fact = facts(step, plan.sizes, micro_seconds=times, optimizer_seconds=seconds, noise=noise)
        state, _ = steering.observe(state, fact)
    return found


def per_step(found, first, last):
    return sum(first <= step < last for step in found) / (last - first)


def test_a_cheap_probe_cuts_one_step_in_eight_until_its_cost_is_known_and_then_one_in_four():
    found = probed_at(steering.init(ADAPTIVE), 100, micro_s=lambda size: 0.01 * size)
    assert set(found.values()) == {(16, 16)}
    assert per_step(found, 1, 17) == 1 / 8
    assert per_step(found, 40, 100) == pytest.approx(1 / 4, abs=0.02)


@pytest.mark.parametrize("overhead", [0.02, 0.04])
def test_cutting_costs_at_most_2_per_cent_of_the_run_from_the_start(overhead):
    found = probed_at(steering.init(ADAPTIVE), 300, micro_s=lambda size: overhead + 0.01 * size)
    whole = 0.001 + overhead + 0.32
    cuts = sum(len(sizes) == 2 for step, sizes in found.items() if step > 8)
    assert cuts * overhead <= 0.021 * 292 * whole


def test_a_cut_that_would_cost_much_is_not_made_but_two_steps_are_compared():
    found = probed_at(steering.init(ADAPTIVE), 200, micro_s=lambda size: 0.01 + 1e-5 * size)
    assert set(found.values()) == {(32,)}
    assert per_step(found, 40, 200) == pytest.approx(1 / 4, abs=0.02)


def test_norms_that_cost_much_are_taken_seldom():
    found = probed_at(
        steering.init(ADAPTIVE), 900, micro_s=lambda size: 0.01 + 1e-5 * size, norms_s=0.002
    )
    assert per_step(found, 100, 900) * 2 * 0.002 <= 0.021 * 0.0113  # both of two steps pay


def test_a_run_that_cannot_grow_is_probed_ever_more_seldom_down_to_one_step_in_64():
    found = probed_at(steering.init(ADAPTIVE), 9000, micro_s=lambda size: 0.01 * size)
    assert per_step(found, 500, 1000) >= 1 / 17
    assert per_step(found, 8000, 9000) == pytest.approx(1 / 64, abs=0.002)


def test_a_summed_loss_is_measured_without_a_cut():
    state = steering.summed(steering.init(ADAPTIVE))
    found = probed_at(state, 60, micro_s=lambda size: 0.01 * size)
    assert set(found.values()) == {(32,)}


@pytest.mark.parametrize("settings", [FIXED, dataclasses.replace(ADAPTIVE, batch=96)])
def test_a_batch_that_is_not_steered_is_neither_probed_nor_changed(settings):
    trace = simulate(LAUNCH_BOUND, settings, 200)
    assert set(trace.batches) == {settings.first_batch}
    assert all(change.what == "micro" for change in trace.changes)
    assert steering.noise_scale(trace.state) is None


def test_pins_are_kept():
    def sizes(**changed):
        state = steering.init(dataclasses.replace(FIXED, **changed))
        return steering.plan(state)[0].sizes

    assert sizes(accum=4) == (8, 8, 8, 8)
    assert sizes(accum=5) == (7, 7, 6, 6, 6)
    assert sizes(micro=12) == (12, 12, 8)
    assert sizes(batch=96, micro=32) == (32, 32, 32)
    assert sizes(batch="adaptive", accum=3, micro=20) == (20, 20, 20)


def test_with_accumulation_and_micro_batch_pinned_the_batch_is_not_steered():
    settings = dataclasses.replace(ADAPTIVE, accum=2, micro=16)
    assert set(simulate(LAUNCH_BOUND, settings, 300).batches) == {32}


@given(left=st.integers(2, 200))
def test_no_last_step_of_one_sample_where_there_are_batch_statistics(left):
    state = steering.init(dataclasses.replace(ADAPTIVE, batch_statistics=True))
    while left:
        plan, state = steering.plan(state, left)
        assert min(plan.sizes) >= 2
        left -= sum(plan.sizes)


def test_an_epoch_with_nothing_left_is_refused():
    with pytest.raises(ValueError, match="begin the next epoch"):
        steering.plan(steering.init(ADAPTIVE), 0)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"loss": math.nan}, "the loss is not finite"),
        ({"grad_norm": math.inf, "skipped": True}, "the gradient is not finite"),
        ({"grad_norm": 1e4}, "times its median"),
    ],
)
def test_a_step_that_blows_up_halves_the_batch_at_once_and_cools_down(changed, words):
    state, step = grown()
    before = state.batch
    plan, state = steering.plan(state)
    fact = dataclasses.replace(facts(step, plan.sizes), **changed)
    state, changes = steering.observe(state, fact)
    assert changes[0].what == "global"
    assert changes[0].before == before
    assert changes[0].after == state.batch <= before // 2
    assert words in changes[0].reason
    _, later = run(state, growth.COOLDOWN - 1, step)
    assert not [change for change in later if change.what == "global"]


def test_a_loss_scale_finding_its_place_is_no_alarm():
    state, step = grown(loss_scaling=True)
    plan, state = steering.plan(state)
    fact = dataclasses.replace(facts(step, plan.sizes), grad_norm=math.inf, skipped=True)
    assert steering.observe(state, fact)[1] == ()


def test_an_oscillating_loss_halves_the_batch():
    state, step = grown()
    before, changes = state.batch, []
    for i in range(64):
        plan, state = steering.plan(state)
        fact = dataclasses.replace(facts(step + i, plan.sizes), loss=4.0 if i // 8 % 2 else 0.5)
        state, found = steering.observe(state, fact)
        changes += found
    assert [change for change in changes if "oscillates" in change.reason]
    assert state.batch <= before // 2


def test_the_base_batch_is_the_floor_of_every_shrink():
    state, step = grown()
    for i in range(30):
        plan, state = steering.plan(state)
        fact = dataclasses.replace(facts(step + i, plan.sizes), loss=math.nan)
        state, _ = steering.observe(state, fact)
    assert state.batch == 32


def test_late_facts_of_larger_steps_do_not_shrink_twice():
    state, step = grown()
    plan, state = steering.plan(state)
    fact = dataclasses.replace(facts(step, plan.sizes), loss=math.nan)
    state, first = steering.observe(state, fact)
    state, second = steering.observe(state, fact)
    assert first
    assert second == ()


def test_memory_above_the_budget_shrinks_the_micro_batch_at_once():
    state, _ = run(steering.init(FIXED), 5)
    plan, state = steering.plan(state)
    before = state.micro
    state, changes = steering.observe(state, facts(5, plan.sizes, peak_bytes=9 * GIB))
    assert state.micro < before
    assert changes[0].what == "micro"
    assert "9 GiB of 8 GiB" in changes[0].reason


def test_allocator_pressure_twice_in_short_counts_as_running_out():
    state, _ = run(steering.init(FIXED), 5)
    plan, state = steering.plan(state)
    before = state.micro
    state, changes = steering.observe(state, facts(5, plan.sizes, pressure=True))
    assert (state.micro, changes) == (before, ())
    state, changes = run(state, 100, 6)  # as after an evaluation
    state, changes = steering.observe(state, facts(106, plan.sizes, pressure=True))
    assert (state.micro, changes) == (before, ())
    state, changes = steering.observe(state, facts(107, plan.sizes, pressure=True))
    assert state.micro < before
    assert len(changes) == 1


def test_running_out_of_memory_halves_until_nothing_smaller_is_left():
    state = steering.init(dataclasses.replace(FIXED, micro=32))
    sizes = steering.recut(state, 32)
    seen = []
    while max(sizes) > 1:
        seen.append(max(sizes))
        state, changes = steering.oom(state, max(sizes), 0)
        assert "ran out of memory" in changes[0].reason
        sizes = steering.recut(state, 32)
    assert seen == [32, 16, 8, 4, 2]
    state, changes = steering.oom(state, 1, 0)
    assert changes == ()
    assert max(steering.recut(state, 32)) == 1


@given(
    base=st.integers(1, 300),
    batch=st.sampled_from(["adaptive", "fixed"]) | st.integers(1, 600),
    accum=st.none() | st.integers(1, 9),
    micro=st.none() | st.integers(1, 80),
    norms=st.booleans(),
    readings=st.booleans(),
    steps=st.lists(st.tuples(st.integers(1, 700), st.integers(0, 4)), min_size=1, max_size=8),
)
def test_every_failure_gives_a_smaller_cut_of_the_same_samples_down_to_the_smallest(
    base, batch, accum, micro, norms, readings, steps
):
    asked = Settings(
        base=base,
        max_batch=16 * base,
        batch=batch,
        accum=accum,
        micro=micro,
        budget_bytes=8 * GIB if readings else None,
    )
    state = steering.init(dataclasses.replace(asked, batch_statistics=norms))
    _, state = steering.plan(state)
    least = 3 if norms else 1  # an odd step has no smaller cut without a single sample in it
    for step, (n, failures) in enumerate(steps):
        sizes = steering.recut(state, n)
        assert steering.fits(state, sizes) or max(sizes) <= least
        for _ in range(failures):
            state, _ = steering.oom(state, max(sizes), step)
            smaller = steering.recut(state, n)
            assert sum(smaller) == n
            assert max(smaller) < max(sizes) or max(smaller) <= least
            sizes = smaller
        plan, state = steering.plan(state)
        assert steering.fits(state, plan.sizes) or max(plan.sizes) <= least
        peak = GIB + 2**20 * max(plan.sizes) if readings else None
        state, _ = steering.observe(state, facts(step, plan.sizes, peak_bytes=peak))


def test_a_pinned_size_that_failed_gives_way_for_steps_larger_than_the_batch_too():
    state = steering.init(dataclasses.replace(FIXED, base=8, max_batch=8, micro=16))
    state, _ = steering.oom(state, 16, 0)  # of a step planned before the batch shrank
    assert max(steering.recut(state, 32)) < 16


def test_sizes_fit_while_they_are_all_below_the_smallest_that_failed():
    state = steering.init(FIXED)
    assert steering.fits(state, (10**6,))
    state, _ = steering.oom(state, 16, 0)
    state, _ = steering.oom(state, 24, 0)  # planned before
    assert steering.fits(state, (15, 1))
    assert not steering.fits(state, (1, 16))


def test_a_step_planned_before_its_size_was_found_above_the_budget_does_not_fit():
    state, _ = run(steering.init(FIXED), 5)
    before = state.micro
    state, _ = steering.observe(state, facts(5, (before,), peak_bytes=9 * GIB))
    assert state.micro < before
    assert not steering.fits(state, (before,))
    assert steering.fits(state, steering.recut(state, 32))


@pytest.mark.parametrize(("norms", "least"), [(False, 1), (True, 2)])
def test_what_fails_again_and_again_is_halved_down_to_the_smallest(norms, least):
    state = steering.init(dataclasses.replace(FIXED, batch_statistics=norms))
    state, _ = run(state, 20, micro_seconds=None)
    seen, sizes = [], steering.recut(state, 32)
    while not seen or max(sizes) < seen[-1]:
        seen.append(max(sizes))
        state, _ = steering.oom(state, seen[-1], 20)
        sizes = steering.recut(state, 32)
    assert max(sizes) == least == seen[-1]
    assert len(seen) <= 6
    assert not steering.fits(state, sizes)  # so the engine knows that nothing smaller is left


def test_the_pressure_of_a_step_that_failed_is_not_held_against_the_size_it_then_ran_in():
    state, _ = run(steering.init(FIXED), 5)
    state, _ = steering.oom(state, state.micro, 5)
    micro = state.micro
    state, changes = steering.observe(state, facts(5, (micro,) * 4, pressure=True))
    assert (state.micro, changes) == (micro, ())


def test_batch_statistics_below_the_loader_batch_are_said():
    state = steering.init(dataclasses.replace(FIXED, batch_statistics=True))
    state, changes = steering.oom(state, 32, 0)
    assert "below the loader's batch of 32" in changes[0].reason
    assert min(steering.recut(state, 32)) >= 2


def test_the_learning_rate_is_ramped_after_growth_and_steps_of_the_old_batch_keep_theirs():
    state = steering.init(dataclasses.replace(ADAPTIVE, lr_scale="linear"))
    state, _ = steering.apply(state, "grow", None, 0)
    assert state.batch == 48
    assert steering.lr_factor(state, 32) == 1.0
    factors = []
    for step in range(25):
        factors.append(steering.lr_factor(state, 48))
        state, _ = steering.observe(state, facts(step, (48,)))
    assert factors[:20] == pytest.approx([1 + 0.025 * (i + 1) for i in range(20)])
    assert factors[20:] == [1.5] * 5


def test_warmup_is_a_ramp_of_as_many_steps_at_the_start():
    state = steering.init(dataclasses.replace(FIXED, warmup=4))
    factors = []
    for step in range(6):
        factors.append(steering.lr_factor(state, 32))
        state, _ = steering.observe(state, facts(step, (32,)))
    assert factors == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_a_remainder_has_the_learning_rate_of_the_base_batch():
    state = steering.init(dataclasses.replace(ADAPTIVE, batch=128, lr_scale="linear"))
    assert steering.lr_factor(state, 128) == 4
    assert steering.lr_factor(state, 64) == 2
    assert steering.lr_factor(state, 5) == 1


@pytest.mark.parametrize(("rule", "factor"), [("linear", 1.0), ("sqrt", 0.5), ("none", 1.0)])
def test_a_summed_loss_has_grown_its_gradient_already(rule, factor):
    settings = dataclasses.replace(ADAPTIVE, batch=128, family="sgd", sum_reduction=True)
    state = steering.init(dataclasses.replace(settings, lr_scale=rule))
    assert steering.lr_factor(state, 128) == factor


def test_a_request_is_recorded_and_named_and_one_that_changes_nothing_is_not():
    state = steering.init(ADAPTIVE)
    for name, value in (
        ("accum", 4),
        ("stability_threshold", 0.5),
        ("growth_factor", 2.0),
        ("max_batch", 256),
        ("lr_multiplier", 0.5),
    ):
        state, changes = steering.apply(state, name, value, 7)
        assert (changes[0].what, changes[0].after, changes[0].step) == ("control", value, 7)
        assert name in changes[0].reason
        assert steering.apply(state, name, value, 8)[1] == ()
    assert steering.plan(state)[0].sizes == (8, 8, 8, 8)
    assert steering.lr_factor(state, 32) == 0.5
    state, changes = steering.apply(state, "accum", None, 9)
    assert changes[0].after == "auto"
    state, _ = steering.apply(state, "max_batch", None, 9)
    assert state.settings.max_batch == 512


def test_a_largest_batch_below_the_present_one_shrinks_it():
    state, step = grown()
    state, changes = steering.apply(state, "max_batch", 64, step)
    assert state.batch == 64
    assert [change.what for change in changes[:2]] == ["control", "global"]


def test_grow_and_shrink_by_hand_are_one_control_record_each():
    state = steering.init(ADAPTIVE)
    state, (grew, *_) = steering.apply(state, "grow", None, 1)
    assert (grew.what, grew.before, grew.after) == ("control", 32, 48)
    state, (shrank, *_) = steering.apply(state, "shrink", None, 2)
    assert (shrank.before, shrank.after) == (48, 24)


def test_the_memory_mark_is_a_fraction_of_the_device():
    state = steering.init(dataclasses.replace(ADAPTIVE, device_bytes=10 * GIB))
    state, changes = steering.apply(state, "memory", 0.5, 1)
    assert state.sizes.budget_bytes == 5 * GIB
    assert "8 GiB -> 5 GiB" in changes[0].reason
    state, _ = steering.apply(state, "memory", None, 2)
    assert state.sizes.budget_bytes == 8 * GIB


def test_the_memory_mark_of_a_device_that_cannot_tell_changes_nothing():
    state = steering.init(ADAPTIVE)
    state, changes = steering.apply(state, "memory", 0.5, 1)
    assert changes == ()
    assert state.sizes.budget_bytes == 8 * GIB


def test_an_unknown_request_is_refused():
    with pytest.raises(ValueError, match="no request 'pause'"):
        steering.apply(steering.init(ADAPTIVE), "pause", None, 0)


def test_the_noise_scale_acted_on_is_told():
    state, _ = grown()
    assert 300 < (steering.noise_scale(state) or 0) < 6000


def test_a_rehearsal_tells_what_larger_steps_cost_before_the_first_one_was_taken():
    state = steering.init(dataclasses.replace(ADAPTIVE, batch_statistics=True))
    points = [(size, 0.01 + 0.001 * size, GIB + size * 2**20) for size in (8, 16, 32)]
    state, _ = steering.rehearsed(state, points + points)
    assert steering.plan(state)[0].sizes == (32,)
    state, _ = run(state, 3)
    assert state.sizes.early_peaks == {8: points[0][2], 16: points[1][2], 32: points[2][2]}
    assert state.sizes.timings[16].later == (0.01 + 0.016,)


def test_a_rehearsal_chooses_nothing_above_the_loader_batch():
    state = steering.init(dataclasses.replace(ADAPTIVE, batch=128, batch_statistics=True))
    points = [(size, 0.01 + 0.001 * size, GIB + size * 2**20) for size in (8, 16, 32)]
    state, _ = steering.rehearsed(state, points + points)
    assert steering.plan(state)[0].sizes == (32,) * 4
    small = dataclasses.replace(
        ADAPTIVE, batch=128, batch_statistics=True, budget_bytes=GIB + 2**24
    )
    state, _ = steering.rehearsed(steering.init(small), points + points)
    assert max(steering.plan(state)[0].sizes) <= 16

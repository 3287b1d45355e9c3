from __future__ import annotations

import dataclasses
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrid_magic.policy import batch, microbatch

MIB = 2**20


def learned(
    sizes, *, overhead=1.0, sample=0.1, fixed=1000, per=10, budget=None, current=None, **init
):
    """A state that ran `sizes` often enough to be sure of them; bytes in MiB."""
    state = microbatch.init(
        budget_bytes=None if budget is None else budget * MIB, current=current or sizes[-1], **init
    )
    for _ in range(20):
        for size in sizes:
            peak = (fixed + per * size) * MIB
            state = microbatch.update(state, size, overhead + sample * size, peak)
    return state


def test_where_memory_is_worth_saving_the_smallest_size_on_the_plateau_is_chosen():
    known = learned([2, 4, 8], overhead=0.1, sample=1.0, budget=9000, per=100)
    size, reason = microbatch.choose(known, 512)
    assert size == 8  # a doubling would gain 1 %
    assert "plateau" in reason


@pytest.mark.parametrize("changed", [{}, {"budget": 20_000, "per": 1}])
def test_where_memory_is_not_worth_saving_a_size_not_yet_sure_gives_way_to_the_whole_step(changed):
    state = learned([2, 4], overhead=0.1, sample=1.0, current=8, **changed)
    for _ in range(2):
        state = microbatch.update(state, 8, 8.1, None)
    size, reason = microbatch.choose(state, 32)
    assert size == 32
    assert "to measure it" in reason


def test_a_size_above_the_plateau_gives_memory_back_by_halves_only_where_that_is_worth_it():
    for per, chosen in ((100, 16), (1, 32)):
        state = learned([4, 8, 32], overhead=0.01, sample=1.0, budget=9000, per=per)
        assert microbatch.choose(state, 32)[0] == chosen
    no_peaks = dataclasses.replace(state, peaks={}, early_peaks={})
    assert microbatch.choose(no_peaks, 32)[0] == 32
    assert microbatch.choose(microbatch.rebudget(state, None), 32)[0] == 32


def test_memory_given_back_in_vain_is_taken_back_and_not_given_again():
    def told(state, size, seconds):
        for _ in range(20):
            state = microbatch.update(state, size, seconds, (1000 + 100 * size) * MIB)
        return state

    state = learned([2, 4, 32], overhead=0.3, sample=1.0, budget=9000, per=100)
    state = microbatch.take(state, microbatch.choose(state, 32)[0])
    assert state.current == 16
    slow = told(state, 16, 16.0 * 1.06)
    size, reason = microbatch.choose(slow, 32)
    assert size == 32
    assert "+5 % samples/s" in reason
    assert microbatch.choose(microbatch.take(slow, size), 32)[0] == 32


def test_memory_is_given_back_twice_at_most_whatever_the_times_then_say():
    state, moves = learned([4, 8, 16, 32], overhead=1.0, sample=1.0, budget=9000, per=100), 0
    for turn in range(40):
        half = 21.0 if turn % 2 else 16.1
        for _ in range(20):
            for size, seconds in ((16, half), (32, 32.0)):
                state = microbatch.update(state, size, seconds, None)
        size, _ = microbatch.choose(state, 32)
        if size != state.current:
            state, moves = microbatch.take(state, size), moves + 1
    assert moves <= 4


def test_memory_is_not_given_back_while_the_noise_of_the_times_may_hide_a_slower_size():
    rng = random.Random(0)
    state = learned([2, 4], overhead=0.3, sample=1.0, budget=9000, per=100, current=32)
    for _ in range(20):
        for size in (16, 32):
            seconds = (0.3 + size) * rng.lognormvariate(0, 0.2)
            state = microbatch.update(state, size, seconds, (1000 + 100 * size) * MIB)
    assert microbatch.choose(state, 32)[0] == 32


def test_a_smaller_size_measured_clearly_faster_is_taken_whatever_the_memory():
    state = learned([4, 8, 16, 32], overhead=0.0, sample=1.0)
    for _ in range(20):
        state = microbatch.update(state, 32, 32 * 1.05, None)
    size, reason = microbatch.choose(state, 32)
    assert size in (4, 8, 16)
    assert "+5 % samples/s" in reason


def test_a_smaller_size_is_not_taken_on_a_difference_that_the_noise_of_its_times_explains():
    state, rng = learned([4, 8], overhead=0.0, sample=1.0, current=32), random.Random(3)
    for _ in range(20):
        for size, seconds in ((16, 15.0), (32, 32.0)):
            state = microbatch.update(state, size, seconds * rng.lognormvariate(0, 0.2), None)
    assert microbatch.choose(state, 32)[0] == 32


def test_a_larger_size_is_chosen_while_it_gains_but_never_far_above_what_was_run():
    size, reason = microbatch.choose(learned([2, 4, 8], overhead=10.0, sample=0.1), 512)
    assert size == 32
    assert "% samples/s" in reason


def test_the_whole_step_is_a_size_too():
    assert microbatch.choose(learned([2, 4, 8], overhead=10.0), 29)[0] == 29


@given(limit=st.integers(1, 5000), budget=st.integers(1011, 9000))
def test_no_size_is_chosen_whose_peak_is_predicted_above_the_budget(limit, budget):
    size, _ = microbatch.choose(learned([1, 2, 4], budget=budget, overhead=9.0, current=1), limit)
    assert size <= min(limit, 16)
    assert size == 1 or 1000 + 10 * size <= budget


@pytest.mark.parametrize("most", [777, 3000, 20_000])
def test_the_edge_of_memory_is_approached_by_running_and_never_overrun(most):
    state = learned([64, 128, 256], budget=1000 + 10 * most, overhead=100.0)
    for _ in range(8):
        size = microbatch.ceiling(state)
        assert size <= most
        state = microbatch.update(state, size, 1.0, (1000 + 10 * size) * MIB)
    assert microbatch.ceiling(state) >= 0.97 * most


def test_a_size_that_is_not_rounded_is_chosen_where_it_saves_a_piece():
    state = learned([8, 16], budget=1250, overhead=50.0)
    assert microbatch.choose(state, 50)[0] == 24  # in three: 25, for two, does not fit
    state = learned([8, 16], budget=1260, overhead=50.0)
    assert microbatch.choose(state, 50)[0] == 25


def test_without_any_peak_or_budget_time_alone_decides():
    state = microbatch.init(budget_bytes=None, current=8)
    for _ in range(10):
        for size in (2, 4, 8):
            state = microbatch.update(state, size, 1.0 + 0.01 * size, None)
    assert microbatch.choose(state, 512)[0] == 32


def test_without_any_time_the_largest_that_fits_is_chosen():
    state = microbatch.init(budget_bytes=1320 * MIB, current=8)
    for size in (4, 8):
        state = microbatch.update(state, size, None, (1000 + 10 * size) * MIB)
    assert microbatch.choose(state, 512)[0] == 31  # 1,310 MiB, with a margin on what was not run


def test_a_size_that_failed_and_everything_above_it_is_never_chosen_again():
    state = microbatch.failed(learned([8, 16, 32], overhead=100.0), 64, error=True)
    for limit in (64, 96, 512):
        assert microbatch.choose(state, limit)[0] <= 32


def test_after_an_error_at_a_size_that_had_run_no_run_proves_anything_and_sizes_are_halved():
    state, seen = learned([8, 16, 24, 32, 40, 48, 56, 64], overhead=100.0), []
    for _ in range(4):
        seen.append(microbatch.choose(state, 64_000)[0] if seen else 64)
        state = microbatch.failed(state, seen[-1], error=True)
    assert seen == [64, 32, 16, 8]


def test_pressure_gives_way_to_the_next_size_that_ran():
    state = microbatch.failed(learned([32, 48, 64], overhead=100.0), 64, error=False)
    assert microbatch.choose(state, 64_000)[0] == 48


def test_the_first_failure_with_nothing_known_halves():
    state = microbatch.failed(microbatch.init(budget_bytes=None, current=8), 8, error=True)
    assert microbatch.choose(state, 32)[0] == 4


def test_failures_are_forgiven_by_a_larger_budget_only():
    state = microbatch.failed(learned([8, 16], budget=4000), 32, error=True)
    assert microbatch.rebudget(state, 3000 * MIB).failed == 32
    assert microbatch.rebudget(state, 5000 * MIB).failed is None


def test_a_measured_peak_above_the_budget_shrinks_at_once():
    state = learned([8, 16, 32], budget=1200, current=32)
    size, reason = microbatch.choose(state, 32)
    assert size < 32
    assert "GiB" in reason


def test_the_first_time_of_a_size_does_not_count():
    state = learned([4, 8], overhead=0.1, sample=1.0)
    state = microbatch.update(state, 16, 500.0, None)
    assert microbatch.step_seconds(state, 16, (16,)) == pytest.approx(16.1, rel=0.05)


def test_spikes_do_not_make_a_size_slow():
    state = learned([4, 8, 16], overhead=10.0)
    for _ in range(4):
        state = microbatch.update(state, 16, 100.0, None)
    assert microbatch.step_seconds(state, 16, (16,)) == pytest.approx(11.6)


def test_peaks_read_before_the_optimizer_has_its_state_give_only_the_slope():
    state = microbatch.init(budget_bytes=2200 * MIB, current=8)
    for size in (2, 4, 8):
        state = microbatch.update(state, size, 1.0 + 0.01 * size, (1000 + 10 * size) * MIB)
    state = microbatch.stepped(state)
    state = microbatch.update(state, 8, 1.08, (2000 + 80) * MIB)
    assert microbatch.predicted_peak(state, 16) == 2160 * MIB
    assert microbatch.choose(state, 512)[0] == 19  # 2,190 MiB


def test_two_nearly_equal_sizes_do_not_take_turns():
    state, moves = learned([16, 32], overhead=0.0, sample=1.0, current=16), 0
    for turn in range(200):
        for size, seconds in ((16, 16.0), (32, 32 * (0.96 if turn % 20 < 10 else 1.04))):
            state = microbatch.update(state, size, seconds, None)
        size, _ = microbatch.choose(state, 32)
        if size != state.current:
            state, moves = microbatch.take(state, size), moves + 1
    assert moves <= 4


@given(limit=st.integers(2, 700), base=st.integers(2, 64))
def test_batch_statistics_keep_the_floor_unless_memory_forces_it(limit, base):
    state = learned([base], floor=base, overhead=5.0)
    size, _ = microbatch.choose(state, limit)
    cut = batch.split(limit, size, floor=base)
    fits = any(limit // k >= base and -(-limit // k) <= 4 * base for k in range(1, limit + 1))
    if fits:
        assert min(cut) >= base
    forced = microbatch.failed(state, base, error=True)
    assert 2 <= microbatch.choose(forced, limit)[0] <= max(2, base // 2)


def test_data_that_can_only_be_split_bounds_the_size():
    assert microbatch.choose(learned([8, 16], overhead=50.0, most=20), 64)[0] <= 20

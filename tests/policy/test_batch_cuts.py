from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrid_magic.policy import batch

sizes = st.integers(1, 2000)


@given(n=sizes, micro=sizes, floor=st.integers(1, 64))
def test_a_cut_sums_to_the_step_and_stays_within_the_micro_batch(n, micro, floor):
    cut = batch.split(n, micro, floor=floor)
    assert sum(cut) == n
    assert min(cut) >= 1
    assert max(cut) <= max(micro, 3 if floor > 1 and n > 1 else 1)


@given(n=sizes, micro=sizes, floor=st.integers(2, 64))
def test_a_cut_keeps_the_floor_wherever_it_can_be_kept(n, micro, floor):
    cut = batch.split(n, micro, floor=floor)
    possible = any(n // k >= floor and -(-n // k) <= micro for k in range(1, n + 1))
    if possible:
        assert min(cut) >= floor
    if n > 1:
        assert min(cut) >= 2


@given(n=sizes, micro=sizes)
def test_a_cut_without_a_floor_has_two_sizes_at_most_and_the_fewest_pieces(n, micro):
    cut = batch.split(n, micro)
    assert len(cut) == -(-n // micro)
    assert len(set(cut[:-1])) <= 1


@pytest.mark.parametrize(
    ("n", "micro", "floor", "cut"),
    [
        (128, 32, 1, (32, 32, 32, 32)),
        (100, 32, 1, (32, 32, 32, 4)),
        (70, 64, 32, (35, 35)),
        (33, 32, 2, (17, 16)),
        (48, 32, 32, (24, 24)),
        (3, 2, 2, (3,)),
        (1, 32, 2, (1,)),
    ],
)
def test_cuts_look_like_this(n, micro, floor, cut):
    assert batch.split(n, micro, floor=floor) == cut


@pytest.mark.parametrize(("n", "micro"), [(0, 1), (1, 0)])
def test_a_cut_of_nothing_or_into_nothing_is_refused(n, micro):
    with pytest.raises(ValueError, match="wanted at least 1 of each"):
        batch.split(n, micro)


@given(n=sizes, count=st.integers(1, 64))
def test_shares_are_as_many_as_asked_and_differ_by_one_at_most(n, count):
    cut = batch.shares(n, count)
    assert sum(cut) == n
    assert len(cut) == min(n, count)
    assert max(cut) - min(cut) <= 1


@given(n=sizes, top=sizes)
def test_the_first_step_rises_never_above_its_top_and_times_each_size_twice_where_it_can(n, top):
    cut = batch.rising(n, top)
    assert sum(cut) == n
    assert max(cut) <= max(top, 2) + 1  # a last single sample joins its neighbour
    assert min(cut) >= min(2, n)
    if 8 <= top <= n // 4:
        rungs = sorted(set(cut[:3]))
        assert list(cut[:6]) == rungs * 2
        assert len(rungs) == 3


@given(n=sizes, micro=sizes)
def test_even_sizes_need_no_more_pieces_and_suit_kernels(n, micro):
    size = batch.even(n, micro)
    assert size <= micro
    assert -(-n // size) == -(-n // micro)


def test_the_ladder_is_short_and_its_rungs_above_16_are_multiples_of_8():
    ladder = batch.ladder(20_000)
    assert ladder[:12] == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64]
    assert len(ladder) < 32
    assert all(rung % 8 == 0 for rung in ladder if rung > 16)


@given(size=st.integers(1, 100_000))
def test_rounding_gives_up_a_third_at_most_and_a_fifteenth_of_large_sizes(size):
    rounded = batch.rounded(size)
    assert rounded <= size
    assert rounded > size * (0.66 if size < 128 else 14 / 15)


@given(st.integers(1, 300), st.integers(1, 64), st.integers(1, 9))
def test_micro_batches_of_several_processes_have_a_sample_for_each_and_can_be_cut(n, micro, least):
    sizes = batch.split(n, micro)
    found = batch.merged(sizes, least)
    assert sum(found) == n
    assert min(found) >= min(least, n)
    if len(sizes) > 1 and n >= 2 * least:  # one that must be smaller gets smaller
        assert max(found) < n
    if max(sizes) >= 2 * least:
        assert max(found) <= max(sizes)

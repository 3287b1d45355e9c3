"""StepSizes gives back what it was given, in little memory, also after a trip through JSON."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrid_magic.sizes import StepSizes

STEPS = st.lists(
    st.tuples(
        st.sampled_from([(8,), (4, 4), (4, 4, 3), (16, 16), (1,)])
        | st.lists(st.integers(1, 4096), min_size=1, max_size=5).map(tuple),
        st.sampled_from([1.0, 2.0**0.5]) | st.floats(0.0, 100.0),
    ),
    max_size=60,
)


def held(steps: list[tuple[tuple[int, ...], float]]) -> StepSizes:
    sizes = StepSizes()
    for cut, factor in steps:
        sizes.append(list(cut), factor)
    return sizes


@given(STEPS)
def test_what_was_taken_in_comes_out_step_by_step(steps) -> None:
    sizes = held(steps)
    assert len(sizes) == len(steps)
    assert list(sizes) == steps
    assert list(sizes) == steps  # looking changes nothing
    assert len(sizes) == len(steps)


@given(STEPS, STEPS)
def test_looking_at_it_between_two_steps_changes_nothing(before, after) -> None:
    looked, steady = held(before), held(before + after)
    looked.entries()
    for cut, factor in after:
        looked.append(cut, factor)
        list(looked)
    assert list(looked) == before + after
    assert looked.entries() == steady.entries()


@given(STEPS)
def test_a_trip_through_json_changes_no_bit(steps) -> None:
    there = json.dumps(held(steps).entries())
    back = StepSizes.from_entries(json.loads(there))
    assert list(back) == steps
    assert json.dumps(back.entries()) == there
    back.append((7,), 0.1)
    assert list(back) == [*steps, ((7,), 0.1)]


@given(STEPS)
def test_an_entry_is_a_stretch_of_equal_steps(steps) -> None:
    assert len(held(steps).entries()) == len(list(itertools.groupby(steps)))


def test_a_million_equal_steps_are_one_entry() -> None:
    sizes = StepSizes()
    for _ in range(1_000_000):
        sizes.append([32], 1.0)
    assert len(sizes) == 1_000_000
    assert sizes.entries() == [(1_000_000, (32,), 1.0)]


def test_cuts_that_come_again_are_held_once() -> None:
    sizes = StepSizes()
    for _ in range(50):  # a step in two is cut in halves to measure the noise scale
        sizes.append([64] * 8, 1.0)
        sizes.append([32] * 16, 1.0)
    entries = sizes.entries()
    assert len(entries) == 100
    assert len({id(cut) for _, cut, _ in entries}) == 2


@pytest.mark.parametrize(
    "entries",
    [
        5,
        [5],
        [[1, [8]]],
        [[1, 8, 1.0]],
        [[1, [], 1.0]],
        [[0, [8], 1.0]],
        [[-2, [8], 1.0]],
        [[1, [0], 1.0]],
        [[1, [8.5], 1.0]],
        [[True, [8], 1.0]],
        [[1, "ab", 1.0]],
        [[1, [8], "1.0"]],
        [[1, [8], None]],
    ],
    ids=json.dumps,
)
def test_what_are_no_entries_is_refused(entries) -> None:
    with pytest.raises((TypeError, ValueError)):
        StepSizes.from_entries(entries)

"""What may be said of means over seeds."""

from __future__ import annotations

import pickle
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrid_magic.policy import comparison
from hybrid_magic.policy.comparison import Estimate, estimate

VALUES = st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=12)


@given(VALUES)
def test_an_estimate_is_the_mean_with_an_interval_around_it(values: list[float]) -> None:
    found = estimate(values)
    assert found is not None
    assert found == pytest.approx(statistics.fmean(values))
    assert found.n == len(values)
    assert (found.spread is None) == (len(values) < 2)
    assert (found.low is None) == (len(values) < comparison.FEWEST) == (found.high is None)
    if found.low is not None and found.high is not None:
        slack = 1e-9 * (1 + max(map(abs, values)))
        assert found.low <= found + slack
        assert found - slack <= found.high


def test_no_values_are_no_estimate_and_equal_values_have_no_width() -> None:
    assert estimate([]) is None
    found = estimate([0.25] * 5)
    assert found is not None
    assert (found.spread, found.low, found.high) == (0.0, 0.25, 0.25)


def test_the_same_values_give_the_same_interval() -> None:
    one, other = estimate([1.0, 2.0, 4.0, 8.0, 9.0]), estimate([1.0, 2.0, 4.0, 8.0, 9.0])
    assert one is not None
    assert vars(one) == vars(other)


@pytest.mark.parametrize("n", [3, 5, 12])
def test_the_interval_covers_the_truth_as_often_as_it_says(n: int) -> None:
    # A percentile interval of three values covers 75 %, of five 81 %.
    source = random.Random(1)
    trials, covered = 300, 0
    for _ in range(trials):
        found = estimate([source.gauss(0, 1) for _ in range(n)])
        assert found is not None
        assert found.low is not None
        assert found.high is not None
        covered += found.low <= 0 <= found.high
    assert covered / trials >= 0.95 - 0.03  # three hundred trials tell it to 3 points


def test_an_estimate_survives_a_pickle_and_counts_as_a_number() -> None:
    one = Estimate(0.5, 0.1, 0.4, 0.6, n=7)
    back = pickle.loads(pickle.dumps(one))
    assert back == one == 0.5
    assert vars(back) == vars(one)


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [(-0.3, 0.2, True), (-0.6, 0.2, None), (-0.9, -0.6, False), (0.6, 0.9, False), (0, 0, True)],
)
def test_within_a_margin_is_said_only_of_a_whole_interval(
    low: float, high: float, said: bool | None
) -> None:
    assert comparison.within(Estimate((low + high) / 2, 0.1, low, high, 5), 0.5) is said
    assert comparison.within(Estimate(0.0, 0.1, n=2), 0.5) is None


def test_a_difference_is_one_when_its_interval_leaves_nothing_out() -> None:
    assert comparison.differs(Estimate(0.3, 0.1, 0.1, 0.5, 5)) is True
    assert comparison.differs(Estimate(-0.3, 0.1, -0.5, -0.1, 5)) is True
    assert comparison.differs(Estimate(0.1, 0.1, -0.1, 0.5, 5)) is False
    assert comparison.differs(Estimate(0.1)) is None


def test_more_spread_wants_more_seeds_and_a_mean_at_the_margin_has_none() -> None:
    wanted = [
        comparison.seeds_wanted(Estimate(0.1, spread, -1, 1, 3), 0.5) for spread in (0.1, 0.5, 2.0)
    ]
    assert wanted == sorted(wanted)  # type: ignore[type-var]
    assert wanted[0] == comparison.FEW
    assert comparison.seeds_wanted(Estimate(0.5, 0.2, -1, 1, 3), 0.5) is None
    assert comparison.seeds_wanted(Estimate(0.49999, 0.2, -1, 1, 3), 0.5) is None
    assert comparison.seeds_wanted(Estimate(0.1), 0.5) is None

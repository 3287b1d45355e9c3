"""Paired comparisons over seeds: means with their spread, bootstrap intervals, what may be said.

Standard library only; the same numbers give the same answer. Knows no run.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Sequence
from typing import Any

FEWEST = 3  # seeds from which an interval is given
FEW = 5  # below so many, an interval is told to rest on little
_DRAWS = 4000
# 97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom
_T = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


class Estimate(float):
    """A mean over seeds, and how sure it is.

    `spread` is the standard deviation over the seeds, None of one; `low` and `high` are the ends of
    the mean's 95 % interval, None of fewer than three; `n` is the number of seeds.
    """

    spread: float | None
    low: float | None
    high: float | None
    n: int

    def __new__(
        cls,
        value: float,
        spread: float | None = None,
        low: float | None = None,
        high: float | None = None,
        n: int = 1,
    ) -> Estimate:
        self = super().__new__(cls, value)
        self.spread, self.low, self.high, self.n = spread, low, high, n
        return self

    def __getnewargs__(self) -> tuple[Any, ...]:  # type: ignore[override]
        return float(self), self.spread, self.low, self.high, self.n


def estimate(values: Sequence[float]) -> Estimate | None:
    """Return the mean of `values`, one a seed, with its spread and interval; None of no values.

    The interval is the bootstrap's, and no narrower than Student's t: of few values the bootstrap
    knows no more than their range, which of three covers the truth three times in four.

    Source:
        Hesterberg 2015, "What Teachers Should Know About the Bootstrap", section 5 (too narrow for
        small samples).
    """
    n = len(values)
    if not n:
        return None
    mean = statistics.fmean(values)
    if n < 2:
        return Estimate(mean)
    spread = statistics.stdev(values)
    if n < FEWEST:
        return Estimate(mean, spread, n=n)
    t = _T[n - 2] if n - 2 < len(_T) else 1.96
    low, high = bootstrap(values, statistics.fmean)
    reach = t * spread / math.sqrt(n)
    return Estimate(mean, spread, min(low, mean - reach), max(high, mean + reach), n=n)


def bootstrap(
    values: Sequence[float],
    statistic: Callable[[Sequence[float]], float],
    *,
    draws: int = _DRAWS,
) -> tuple[float, float]:
    """Return the 95 % percentile bootstrap interval of `statistic`."""
    source = random.Random(0)
    drawn = sorted(statistic(source.choices(values, k=len(values))) for _ in range(draws))
    cut = int(0.025 * draws)
    return drawn[cut], drawn[-1 - cut]


def within(difference: Estimate, margin: float) -> bool | None:
    """Return whether a mean difference surely is, or surely is not, within `margin` of nothing;
    None where its interval says neither, or there is none."""
    if difference.low is None or difference.high is None:
        return None
    if -margin <= difference.low and difference.high <= margin:
        return True
    return False if difference.low > margin or difference.high < -margin else None


def differs(difference: Estimate) -> bool | None:
    """Return whether a mean difference's interval leaves nothing out; None where there is none."""
    if difference.low is None or difference.high is None:
        return None
    return difference.low > 0 or difference.high < 0


def seeds_wanted(difference: Estimate, margin: float) -> int | None:
    """Return about how many seeds would tell whether the difference is within `margin`.

    None where the mean lies so near the margin that more than 1,000 would be needed, or one seed
    tells nothing of the spread.
    """
    room = abs(abs(difference) - margin)
    if difference.spread is None or not room:
        return None
    n = math.ceil((1.96 * difference.spread / room) ** 2) + 2
    return max(n, difference.n + 1, FEW) if n <= 1000 else None

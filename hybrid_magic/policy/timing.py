"""Seconds of a micro-batch by its size: measured, or along a line through what was measured.

Times are noisy, upwards mostly, and the first of each size pays for its kernels. Knows no memory
and no choice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

TIMES = 15  # seconds kept for each size; their lower median counts
SURE = 4  # measurements after which a size is known


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one size: the first is a warm-up, and counts only while there is no other."""

    first: float
    later: tuple[float, ...] = ()

    @property
    def typical(self) -> float:
        """The lower median: neither a spike nor one lucky time moves it."""
        return sorted(self.later)[(len(self.later) - 1) // 2] if self.later else self.first


def timed(timing: Timing | None, seconds: float) -> Timing:
    """Return `timing` with one more measurement."""
    if timing is None:
        return Timing(seconds)
    return Timing(timing.first, (*timing.later[1 - TIMES :], seconds))


@dataclass(frozen=True, slots=True)
class SpeedModel:
    """Predicted seconds: the sizes that are sure, those measured a few times, and the line."""

    sure: Mapping[int, float]
    few: Mapping[int, float]
    overhead: float
    per_sample: float

    def seconds(self, size: int) -> float:
        """Return the seconds of `size`: measured where that is sure, else those of the nearest sure
        size carried along the line; of a few measurements and that the lower, as disturbances only
        ever add."""
        if size in self.sure:
            return self.sure[size]
        predicted = self.overhead + self.per_sample * size
        if self.sure:
            near = min(self.sure, key=lambda one: abs(one - size))
            predicted *= self.sure[near] / (self.overhead + self.per_sample * near)
        return min(predicted, self.few.get(size, predicted))


def model(timings: Mapping[int, Timing]) -> SpeedModel:
    """Return what the times measured so far predict."""
    warm = {size: timing for size, timing in timings.items() if timing.later}
    sure = {size: timing.typical for size, timing in warm.items() if len(timing.later) >= SURE}
    few = {size: timing.typical for size, timing in warm.items() if size not in sure}
    return SpeedModel(sure, few, *_line(warm if len(warm) > 1 else timings))


def _line(points: Mapping[int, Timing]) -> tuple[float, float]:
    """Return (overhead, seconds per sample), fitted so that relative errors count.

    Without any time a step is taken to be all overhead: the largest size that fits is then best.
    """
    if not points:
        return 1.0, 0.0
    n = x = y = xx = xy = 0.0
    for size, timing in points.items():
        seconds = timing.typical
        weight = max(1, len(timing.later)) / seconds**2
        n, x, y = n + weight, x + weight * size, y + weight * seconds
        xx, xy = xx + weight * size * size, xy + weight * size * seconds
    spread = n * xx - x * x
    if len(points) < 2 or spread <= 0:
        return 0.0, xy / xx
    per_sample = (n * xy - x * y) / spread
    overhead = (y - per_sample * x) / n
    if overhead < 0:
        return 0.0, xy / xx
    return (overhead, per_sample) if per_sample > 0 else (y / n, 0.0)

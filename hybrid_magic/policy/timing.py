"""Seconds of a micro-batch by its size: measured, or along a line through what was measured.

Times are noisy, upwards mostly, and the first of each size pays for its kernels. Knows no memory
and no choice.
"""

from __future__ import annotations

import math
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

    @property
    def error(self) -> float:
        """The relative standard error of `typical`, from the middle half of the times."""
        times, n = sorted(self.later), len(self.later)
        half = times[(3 * n) // 4] - times[n // 4] if n else 0.0
        return 1.25 * (half / 1.35) / math.sqrt(n) / self.typical if n else 0.0


def timed(timing: Timing | None, seconds: float) -> Timing:
    """Return `timing` with one more measurement."""
    if timing is None:
        return Timing(seconds)
    return Timing(timing.first, (*timing.later[1 - TIMES :], seconds))


@dataclass(frozen=True, slots=True)
class SpeedModel:
    """Predicted seconds: the sizes that are sure, and the line through all that were measured."""

    sure: Mapping[int, float]
    overhead: float
    per_sample: float

    def seconds(self, size: int) -> float:
        """Return the seconds of `size`: measured where that is sure, else those of the nearest sure
        size carried along the line. A few times of a size move the line only: the lucky ones among
        many sizes would otherwise look best."""
        if size in self.sure:
            return self.sure[size]
        predicted = self.overhead + self.per_sample * size
        if self.sure:
            near = min(self.sure, key=lambda one: abs(one - size))
            predicted *= self.sure[near] / (self.overhead + self.per_sample * near)
        return predicted


def model(timings: Mapping[int, Timing]) -> SpeedModel:
    """Return what the times measured so far predict."""
    warm = {size: timing for size, timing in timings.items() if timing.later}
    sure = {size: timing.typical for size, timing in warm.items() if len(timing.later) >= SURE}
    return SpeedModel(sure, *_line(warm if len(warm) > 1 else timings))


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

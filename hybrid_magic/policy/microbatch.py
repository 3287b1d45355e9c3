"""The micro-batch: the smallest size on the throughput plateau that fits in memory.

Learned from points (size, seconds, peak bytes) of steps that train anyway. Knows no device and no
global batch: `limit` is the step to be cut. Never asks for a size far above any that was run.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from . import batch

PLATEAU_GAIN = 0.03  # less than this much more throughput is not worth a larger micro-batch
REACH = 4  # a size is never more than this many times the largest that was run
MARGIN = 1.1  # on the part of a predicted peak that was never measured
TIMES = 9  # seconds kept for each size; their lower median counts
KEEP_WITHIN = 0.01  # a smaller size must be this close to the present one before memory is given back


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one size: the first is a warm-up, and counts only while there is no other."""

    first: float
    later: tuple[float, ...] = ()

    @property
    def typical(self) -> float:
        """The lower median: neither a spike nor one lucky time moves it."""
        return sorted(self.later)[(len(self.later) - 1) // 2] if self.later else self.first


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroState:
    """What is known about sizes. Bytes are device peaks while the size ran, the highest seen.

    `floor` is the smallest size wanted, `most` the largest possible, `current` the one in use,
    `failed` the smallest that ran out of memory. `early_peaks` were read before the optimizer had
    made its state: good for the slope, not for the height.
    """

    budget_bytes: int | None
    floor: int
    most: int | None
    current: int
    failed: int | None = None
    timings: Mapping[int, Timing] = field(default_factory=dict[int, Timing])
    peaks: Mapping[int, int] = field(default_factory=dict[int, int])
    early_peaks: Mapping[int, int] = field(default_factory=dict[int, int])
    left: Mapping[int, int] = field(default_factory=dict[int, int])  # how often a size was left again


def init(*, budget_bytes: int | None, current: int, floor: int = 1, most: int | None = None) -> MicroState:
    """Return the state before any point; `budget_bytes` None is unknown, and then only time counts."""
    return MicroState(budget_bytes=budget_bytes, floor=floor, most=most, current=current)


def update(state: MicroState, size: int, seconds: float | None, peak_bytes: int | None) -> MicroState:
    """Return `state` with one more point; a reading that is None was not taken.

    Args:
        size: samples in the micro-batch.
        seconds: of its forward and backward together.
        peak_bytes: highest device memory while it ran.
    """
    timings, peaks = state.timings, state.peaks
    if seconds is not None and seconds > 0:
        old = timings.get(size)
        new = Timing(seconds) if old is None else Timing(old.first, (*old.later[1 - TIMES :], seconds))
        timings = {**timings, size: new}
    if peak_bytes is not None and peak_bytes > peaks.get(size, 0):
        peaks = {**peaks, size: peak_bytes}
    return dataclasses.replace(state, timings=timings, peaks=peaks)


def stepped(state: MicroState) -> MicroState:
    """Return `state` after the first optimizer step, from which on the optimizer's state is in memory."""
    return dataclasses.replace(state, early_peaks=state.peaks, peaks={})


def failed(state: MicroState, size: int) -> MicroState:
    """Return `state` with `size` ruled out, and everything above it."""
    return dataclasses.replace(state, failed=min(size, state.failed or size))


def rebudget(state: MicroState, budget_bytes: int | None) -> MicroState:
    """Return `state` under another memory budget; a larger one forgives the sizes that failed."""
    grew = budget_bytes is None or (state.budget_bytes is not None and budget_bytes > state.budget_bytes)
    return dataclasses.replace(state, budget_bytes=budget_bytes, failed=None if grew else state.failed)


def take(state: MicroState, size: int, *, same_limit: bool = True) -> MicroState:
    """Return `state` with `size` in use. Going back to a size that was left for steps of the same
    limit asks for twice the gain each time, so that two nearly equal sizes cannot take turns for ever."""
    if not same_limit:
        return dataclasses.replace(state, current=size, left={})
    left = {**state.left, state.current: state.left.get(state.current, 0) + 1}
    return dataclasses.replace(state, current=size, left=left)


def choose(state: MicroState, limit: int) -> tuple[int, str]:
    """Return the micro-batch for steps of `limit` samples, and why, as a clause with its numbers."""
    sizes = _candidates(state, limit)
    if not sizes:
        return _retreat(state, limit), _memory_clause(state)
    line = _line(state)
    seconds = {size: _step_seconds(state, line, limit, size) for size in sizes}
    best = min(seconds.values())
    wanted = min(size for size in sizes if seconds[size] <= best * (1 + PLATEAU_GAIN))
    current = batch.even(limit, state.current)
    if current not in seconds:
        return wanted, _memory_clause(state)
    gain = seconds[current] / seconds[wanted] - 1
    times_left = state.left.get(wanted, 0)
    if wanted > current and gain > PLATEAU_GAIN * 2**times_left:
        return wanted, f"+{100 * gain:.0f} % samples/s{peak_clause(state, wanted)}"
    if 2 * wanted <= current and gain >= -KEEP_WITHIN * 0.5**times_left:
        return wanted, f"no slower, less memory{peak_clause(state, wanted)}"
    return current, "on the throughput plateau"


def ceiling(state: MicroState) -> int:
    """Return the largest size that may be run now: possible, near enough to what was run, clear of
    what failed, and within the budget by measurement or by the line through the peaks."""
    known = state.timings.keys() | state.peaks.keys() | state.early_peaks.keys()
    top = REACH * max(known) if known else state.current
    if state.most is not None:
        top = min(top, state.most)
    if state.failed is not None:
        good = max((size for size in known if size < state.failed), default=0)
        top = min(top, max(good, state.failed // 2))
    peaks = state.peaks or state.early_peaks
    if state.budget_bytes is None or not peaks:
        return top
    return min(top, _edge(state, peaks, state.budget_bytes))


def predicted_peak(state: MicroState, size: int) -> int | None:
    """Return the peak bytes of a micro-batch of `size`, None when no peak was ever read.

    Measured where it was; else along the line through the largest size measured.
    """
    peaks = state.peaks or state.early_peaks
    if not peaks or size in peaks:
        return peaks.get(size)
    largest = max(peaks)
    return max(0, int(peaks[largest] + _slope(state, peaks) * (size - largest)))


def step_seconds(state: MicroState, limit: int, sizes: tuple[int, ...] | None = None) -> float | None:
    """Return the seconds of all forwards and backwards of a step of `limit` samples, cut into `sizes`
    or, without them, as well as memory allows. None while the times of two sizes are not known, as
    one tells nothing of another."""
    if len(state.timings) < 2 and limit not in state.timings:
        return None
    line = _line(state)
    if sizes is not None:
        return sum(count * _seconds(state, line, size) for size, count in Counter(sizes).items())
    choices = _candidates(state, limit)
    return min((_step_seconds(state, line, limit, size) for size in choices), default=None)


def peak_clause(state: MicroState, size: int) -> str:
    """Return ", peak 5.1 of 14.7 GiB" for a micro-batch of `size`, or nothing where it is not known."""
    peak = predicted_peak(state, size)
    if peak is None or state.budget_bytes is None:
        return ""
    return f", peak {peak / 2**30:.3g} of {state.budget_bytes / 2**30:.3g} GiB"


def _candidates(state: MicroState, limit: int) -> list[int]:
    """Return the sizes worth comparing for a step of `limit`, ascending: the ladder, the ceiling, the
    whole step and the present size, each made even, without those that leave less than the floor."""
    top = min(ceiling(state), limit)
    if top < 1:
        return []
    rungs = {*batch.ladder(top), top if top == limit else batch.rounded(top), min(top, state.current)}
    sizes = sorted({batch.even(limit, rung) for rung in rungs})
    if state.floor < 2:
        return sizes
    least = min(state.floor, limit)
    floored = [size for size in sizes if limit // -(-limit // size) >= least]
    return floored or [size for size in sizes if size >= min(2, limit)][-1:]


def _edge(state: MicroState, peaks: Mapping[int, int], budget_bytes: int) -> int:
    """Return the size at which the peak meets the budget; below it where that was measured."""
    largest = max(peaks)
    slope = _slope(state, peaks)
    room = budget_bytes - peaks[largest]
    if room >= 0:
        return int(largest + room / (slope * MARGIN)) if slope > 0 else REACH * largest
    over = min(size for size, peak in peaks.items() if peak > budget_bytes)
    within = max((size for size in peaks if size < over), default=0)
    line = int(largest + room * MARGIN / slope) if slope > 0 else 0
    return max(within, min(over - 1, line))


def _retreat(state: MicroState, limit: int) -> int:
    """Return half the present size, the floor of batch statistics giving way down to two."""
    return max(min(2, state.floor, limit), min(state.current, limit) // 2, 1)


def _slope(state: MicroState, peaks: Mapping[int, int]) -> float:
    """Return bytes per sample: the steeper of the slopes between the two largest sizes, now and in
    the first step; with a single size its peak is taken as proportional, which errs upwards."""
    slopes: list[float] = []
    for points in (state.peaks, state.early_peaks):
        if len(points) > 1:
            below, above = sorted(points)[-2:]
            slopes.append((points[above] - points[below]) / (above - below))
    largest = max(peaks)
    return max(0.0, *slopes) if slopes else peaks[largest] / largest


def _line(state: MicroState) -> tuple[float, float]:
    """Return (overhead, seconds per sample), fitted so that relative errors count.

    Without any time a step is taken to be all overhead: the largest size that fits is then best.
    """
    warm = {size: timing for size, timing in state.timings.items() if timing.later}
    points = warm if len(warm) > 1 else state.timings
    if not points:
        return 1.0, 0.0
    n = x = y = xx = xy = 0.0
    for size, timing in points.items():
        seconds = timing.typical
        weight = 1 / seconds**2
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


def _step_seconds(state: MicroState, line: tuple[float, float], limit: int, size: int) -> float:
    full, rest = divmod(limit, size)
    seconds = full * _seconds(state, line, size)
    return seconds + _seconds(state, line, rest) if rest else seconds


def _seconds(state: MicroState, line: tuple[float, float], size: int) -> float:
    """Return the measured seconds of `size`, else those of the nearest size carried along the line."""
    timing = state.timings.get(size)
    if timing is not None and timing.later:
        return timing.typical
    overhead, per_sample = line
    predicted = overhead + per_sample * size
    warm = [one for one, timing in state.timings.items() if timing.later]
    if not warm:
        return predicted
    near = min(warm, key=lambda one: abs(one - size))
    return predicted * state.timings[near].typical / (overhead + per_sample * near)


def _memory_clause(state: MicroState) -> str:
    if state.failed is not None:
        return f"{state.failed} ran out of memory"
    highest = max((state.peaks or state.early_peaks).values(), default=0)
    if state.budget_bytes is None:
        return "more does not fit"
    return f"memory, peak {highest / 2**30:.3g} of {state.budget_bytes / 2**30:.3g} GiB"

"""The micro-batch: the size on the throughput plateau that memory asks for, else the largest.

Learned from points (size, seconds, peak bytes) of steps that train anyway. Knows no device and no
global batch: `limit` is the step to be cut. Never asks for a size far above any that was run.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from . import batch
from .timing import TIMES, SpeedModel, Timing, model, timed

PLATEAU_GAIN = 0.03  # less than this much more throughput is not worth another micro-batch
SAME = 0.01  # times this near count as one: then the larger size, whose kernels are fewer
WORTH_SAVING = 0.02  # of the budget: less than one growth of the batch asks for, and host memory of
# a process that computes on a CPU hardly moves at all
CLEARLY = 3  # standard errors that a measured difference must exceed
REACH = 4  # a size is never more than this many times the largest that was run
MARGIN = 1.03  # on the part of a predicted peak that was never measured


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroState:
    """What is known about sizes. Bytes are device peaks while the size ran, the highest seen.

    `floor` is the smallest size wanted, `most` the largest possible, `current` the one in use,
    `failed` the smallest that ran out of memory, `proven` the largest below it that surely fits,
    `left` how often a size was left.
    `early_peaks` were read before the optimizer had made its state: good for the slope, not for the
    height.
    """

    budget_bytes: int | None
    floor: int
    most: int | None
    current: int
    failed: int | None = None
    proven: int = 0
    timings: Mapping[int, Timing] = field(default_factory=dict[int, Timing])
    peaks: Mapping[int, int] = field(default_factory=dict[int, int])
    early_peaks: Mapping[int, int] = field(default_factory=dict[int, int])
    left: Mapping[int, int] = field(default_factory=dict[int, int])


def init(
    *, budget_bytes: int | None, current: int, floor: int = 1, most: int | None = None
) -> MicroState:
    """Return the state before any point; where `budget_bytes` is not known only time counts."""
    return MicroState(budget_bytes=budget_bytes, floor=floor, most=most, current=current)


def update(
    state: MicroState, size: int, seconds: float | None, peak_bytes: int | None
) -> MicroState:
    """Return `state` with one more point; a reading that is None was not taken.

    Args:
        size: samples in the micro-batch.
        seconds: of its forward and backward together.
        peak_bytes: highest device memory while it ran.
    """
    timings, peaks = state.timings, state.peaks
    if seconds is not None and seconds > 0:
        timings = {**timings, size: timed(timings.get(size), seconds)}
    if peak_bytes is not None and peak_bytes > peaks.get(size, 0):
        peaks = {**peaks, size: peak_bytes}
    return dataclasses.replace(state, timings=timings, peaks=peaks)


def stepped(state: MicroState) -> MicroState:
    """Return `state` after the first optimizer step, whose own state is in memory from then on."""
    return dataclasses.replace(state, early_peaks=state.peaks, peaks={})


def failed(state: MicroState, size: int, *, error: bool) -> MicroState:
    """Return `state` with `size` ruled out, and everything above it. An out-of-memory error
    (`error`) at a size that had run says that others took memory: then no run proves anything."""
    ran = state.timings.keys() | state.peaks.keys()
    proven = 0 if error and size in ran else max((one for one in ran if one < size), default=0)
    if state.failed is not None:
        size, proven = min(size, state.failed), min(proven, state.proven)
    return dataclasses.replace(state, failed=size, proven=proven)


def rebudget(state: MicroState, budget_bytes: int | None) -> MicroState:
    """Return `state` under another memory budget; a larger one forgives the sizes that failed."""
    old = state.budget_bytes
    grew = budget_bytes is None or (old is not None and budget_bytes > old)
    failed = None if grew else state.failed
    return dataclasses.replace(state, budget_bytes=budget_bytes, failed=failed)


def take(state: MicroState, size: int, *, same_limit: bool = True) -> MicroState:
    """Return `state` with `size` in use.

    Going back to a size that was left, for steps of the same limit, asks for twice the gain from
    the second time on, so that two nearly equal sizes cannot take turns for ever.
    """
    if not same_limit:
        return dataclasses.replace(state, current=size, left={})
    left = {**state.left, state.current: state.left.get(state.current, 0) + 1}
    return dataclasses.replace(state, current=size, left=left)


def choose(state: MicroState, limit: int) -> tuple[int, str]:
    """Return the micro-batch for steps of `limit` samples, and why: a clause with its numbers."""
    sizes = _candidates(state, limit)
    if not sizes:
        return _retreat(state, limit), _memory_clause(state)
    speed = model(state.timings)
    seconds = {size: _step_seconds(speed, limit, size) for size in sizes}
    current = batch.even(limit, state.current)
    wanted = _wanted(state, seconds)
    if current not in seconds:
        if wanted > current:
            return wanted, "batch statistics want the largest that fits"
        return wanted, _memory_clause(state)
    unsure = current not in speed.sure or len(state.timings) < 2  # one size tells of no other
    if wanted > current and unsure and wanted not in state.left:
        return wanted, f"to measure it{peak_clause(state, wanted)}"
    measured = [size for size in sizes if size < current and _measured(speed, limit, size)]
    fastest = min(measured, key=lambda size: seconds[size], default=current)
    for size in (wanted, fastest):
        gain = seconds[current] / seconds[size] - 1
        sure = size > current or (current in speed.sure and size == fastest)
        if sure and gain > _enough(state, current, size):
            return size, f"+{100 * gain:.0f} % samples/s{peak_clause(state, size)}"
    known = len(state.timings[current].later) >= TIMES if current in state.timings else False
    if wanted >= current or not known:
        return current, "on the throughput plateau"
    smaller = min(size for size in sizes if size >= wanted and 2 * size >= current)  # by halves
    if state.left.get(smaller, 0) > 1:  # given back before, in vain
        return current, "on the throughput plateau"
    slower = seconds[smaller] / seconds[current] - 1 + _error(state, current, smaller)
    if 3 * smaller > 2 * current or slower > SAME or not _worth_saving(state, current, smaller):
        return current, "on the throughput plateau"
    return smaller, f"no slower, less memory{peak_clause(state, smaller)}"


def _wanted(state: MicroState, seconds: Mapping[int, float]) -> int:
    """Return the size to have by these seconds of a step: the smallest on the plateau where that
    saves memory worth having, else the largest of the fastest."""
    best = min(seconds.values())
    smallest = min(size for size, taken in seconds.items() if taken <= best * (1 + PLATEAU_GAIN))
    largest = max(size for size, taken in seconds.items() if taken <= best * (1 + SAME))
    return smallest if _worth_saving(state, largest, smallest) else largest


def _worth_saving(state: MicroState, larger: int, smaller: int) -> bool:
    """Return whether `smaller` is predicted to need clearly less memory; false where not known."""
    if state.budget_bytes is None or max(len(state.peaks), len(state.early_peaks)) < 2:
        return False
    peaks = [predicted_peak(state, size) or 0 for size in (larger, smaller)]
    return peaks[0] - peaks[1] >= WORTH_SAVING * state.budget_bytes


def _measured(speed: SpeedModel, limit: int, size: int) -> bool:
    """Return whether a step of `limit` in micro-batches of `size` is timed, not predicted."""
    return size in speed.sure and (limit % size == 0 or limit % size in speed.sure)


def _enough(state: MicroState, current: int, size: int) -> float:
    """Return the gain that going from `current` to `size` asks for: one that the noise of the times
    does not explain, except on the way back from a size taken for its memory."""
    enough = PLATEAU_GAIN * 2 ** max(0, state.left.get(size, 0) - 1)
    if size > current and size in state.left and _worth_saving(state, size, current):
        return enough
    return enough + CLEARLY * _error(state, current, size)


def _error(state: MicroState, *sizes: int) -> float:
    """Return the relative standard error of the ratio of two sizes' times, as far as measured."""
    return math.hypot(*(state.timings[one].error for one in sizes if one in state.timings))


def ceiling(state: MicroState) -> int:
    """Return the largest size that may be run now: possible, near enough to what was run, clear of
    what failed, and within the budget by measurement or by the line through the peaks."""
    known = state.timings.keys() | state.peaks.keys() | state.early_peaks.keys()
    top = REACH * max(known) if known else state.current
    if state.most is not None:
        top = min(top, state.most)
    peaks = state.peaks or state.early_peaks
    edge = top
    if state.budget_bytes is not None and peaks:
        edge = _edge(state, peaks, state.budget_bytes)
    if state.failed is not None and edge >= state.failed:  # against all prediction
        edge = max(state.proven, state.failed // 2)
    return min(top, edge)


def predicted_peak(state: MicroState, size: int) -> int | None:
    """Return the peak bytes of a micro-batch of `size`, None when no peak was ever read.

    Measured where it was; else along the line through the largest size measured.
    """
    peaks = state.peaks or state.early_peaks
    if not peaks or size in peaks:
        return peaks.get(size)
    largest = max(peaks)
    return max(0, int(peaks[largest] + _slope(state, peaks) * (size - largest)))


def step_seconds(
    state: MicroState, limit: int, sizes: tuple[int, ...] | None = None
) -> float | None:
    """Return the seconds of all forwards and backwards of a step of `limit` samples.

    Cut into `sizes` or, without them, as well as memory allows. None while the times of two sizes
    are not known, as one tells nothing of another.
    """
    if len(state.timings) < 2 and limit not in state.timings:
        return None
    speed = model(state.timings)
    if sizes is not None:
        return sum(count * speed.seconds(size) for size, count in Counter(sizes).items())
    choices = _candidates(state, limit)
    return min((_step_seconds(speed, limit, size) for size in choices), default=None)


def peak_clause(state: MicroState, size: int) -> str:
    """Return ", peak 5.1 GiB of 14.7 GiB" for a micro-batch of `size`, nothing where not known."""
    peak = predicted_peak(state, size)
    if peak is None or state.budget_bytes is None:
        return ""
    return f", peak {peak / 2**30:.3g} GiB of {state.budget_bytes / 2**30:.3g} GiB"


def _candidates(state: MicroState, limit: int) -> list[int]:
    """Return the sizes worth comparing for a step of `limit`, ascending.

    The ladder, the ceiling, the whole step and the present size, each made even, without those that
    leave less than the floor.
    """
    top = min(ceiling(state), limit)
    if top < 1:
        return []
    rungs = {*batch.ladder(top), batch.rounded(top), top, min(top, state.current)}
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
    """Return half of what is too large, the floor of batch statistics giving way down to two."""
    least = min(2, state.floor, limit)
    return max(least, min(state.current, limit, state.failed or limit) // 2, 1)


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


def _step_seconds(speed: SpeedModel, limit: int, size: int) -> float:
    full, rest = divmod(limit, size)
    return full * speed.seconds(size) + (speed.seconds(rest) if rest else 0.0)


def _memory_clause(state: MicroState) -> str:
    highest = max((state.peaks or state.early_peaks).values(), default=0)
    if state.failed is not None and highest <= (state.budget_bytes or math.inf):
        return f"{state.failed} ran out of memory"
    if state.budget_bytes is None:
        return "more does not fit"
    return f"memory, peak {highest / 2**30:.3g} GiB of {state.budget_bytes / 2**30:.3g} GiB"

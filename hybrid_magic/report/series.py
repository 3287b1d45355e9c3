"""Curves out of records: finite points, smoothed, thinned, cut into stairs and bars.

Plain lists of numbers; knows no matplotlib and no page. Extremes survive the thinning.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, TypeVar

from ..records import StartRecord, StepRecord, TelemetryRecord
from ..run import Run

Point = tuple[float, float]
_Stepped = TypeVar("_Stepped", StepRecord, TelemetryRecord)  # a record that tells its step

STAGES = ("data", "forward", "backward", "optimizer")

MOST_POINTS = 600  # per curve; more cannot be told apart at the figure's width
MOST_BARS = 60


def stage_names(start: StartRecord | None) -> tuple[str, ...]:
    """Return what STAGES, and the rest of a step, are called in a run."""
    shared = start is not None and start.processes > 1
    return (*STAGES[:-1], "exchange, optimizer" if shared else STAGES[-1], "other")


def finite_points(
    history: Sequence[_Stepped], read: Callable[[_Stepped], float | None]
) -> list[Point]:
    """Return (step, reading) of every record whose reading is a finite number."""
    read_all = ((record.step, read(record)) for record in history)
    return [
        (step, float(value))
        for step, value in read_all
        if value is not None and math.isfinite(value)
    ]


def smoothed(points: Sequence[Point]) -> list[Point]:
    """Return an average over about a sixtieth of the run, unbiased at its start."""
    keep = 1 - 1 / max(1.0, len(points) / 60)
    total = weight = 0.0
    smooth = []
    for x, y in points:
        total, weight = keep * total + (1 - keep) * y, keep * weight + (1 - keep)
        smooth.append((x, total / weight))
    return smooth


def thinned(points: Sequence[Point]) -> Sequence[Point]:
    """Return at most MOST_POINTS points: the lowest and the highest of each group of neighbours."""
    width = math.ceil(2 * len(points) / MOST_POINTS)
    if width <= 2:
        return points
    kept = []
    for at in range(0, len(points), width):
        group = sorted(points[at : at + width], key=lambda point: point[1])
        kept += sorted({group[0], group[-1]})
    return kept


def settled(sizes: Sequence[int]) -> list[int]:
    """Return batch sizes without the dips that come back at once.

    An epoch's last, smaller batch and a step that was cut to measure the noise scale are no
    decisions: dips of up to two steps are filled (a morphological closing over five).
    """
    if len(set(sizes)) < 2:
        return list(sizes)
    highest = [max(sizes[max(0, at - 2) : at + 3]) for at in range(len(sizes))]
    return [min(highest[max(0, at - 2) : at + 3]) for at in range(len(sizes))]


def stairs(steps: Sequence[int], sizes: Sequence[int]) -> list[Point]:
    """Return the corners of the staircase of settled sizes: the first, each change, the last."""
    whole, last = settled(sizes), len(sizes) - 1
    return [
        (float(steps[at]), float(size))
        for at, size in enumerate(whole)
        if at in (0, last) or size != whole[at - 1]
    ]


def last_whole_step(history: Sequence[StepRecord]) -> StepRecord:
    """Return the last step that was not the small rest of an epoch, nor cut to measure."""
    return max(history[-3:], key=lambda record: (record.global_batch_size, record.microbatch_size))


def height_at(corners: Sequence[Point], step: float) -> float:
    """Return how high a staircase stands at `step`."""
    return next((y for x, y in reversed(corners) if x <= step), corners[0][1])


def validations(run: Run) -> list[Point]:
    """Return (step, loss) of each validation, at the step that its epoch ended with."""
    per_epoch = run.start.samples_per_epoch if run.start else None
    found = []
    for at, metrics in enumerate(run.metrics):
        loss = metrics.get("loss")
        if loss is None or not math.isfinite(loss) or not len(run.history):
            continue
        epochs = metrics.get("epoch", at + 1)
        last = run.history[-1].step
        step = last * (at + 1) / len(run.metrics)
        if per_epoch:
            seen = epochs * per_epoch
            step = next(
                (record.step for record in run.history if record.samples_seen >= seen), last
            )
        found.append((float(step), float(loss)))
    return found


class Bar(NamedTuple):
    """The mean of `steps` neighbouring steps: ms in each of STAGES, then in none of them."""

    step: float
    stages_ms: list[float]
    steps: int


def stage_bars(history: Sequence[StepRecord]) -> list[Bar]:
    """Return where the time of a step went, in at most MOST_BARS bars; none if not timed."""
    timed = [
        record for record in history if record.step_s is not None or record.forward_s is not None
    ]
    width = max(1, math.ceil(len(timed) / MOST_BARS))
    bars = []
    for at in range(0, len(timed), width):
        group = timed[at : at + width]
        stages = [1e3 * _mean(getattr(record, f"{name}_s") for record in group) for name in STAGES]
        rest = 1e3 * _mean(record.step_s for record in group) - sum(stages)
        middle = sum(record.step for record in group) / len(group)
        bars.append(Bar(middle, [*stages, max(0.0, rest)], len(group)))
    return bars


def _mean(readings: Iterable[float | None]) -> float:
    known = [reading for reading in readings if reading is not None]
    return sum(known) / len(known) if known else 0.0

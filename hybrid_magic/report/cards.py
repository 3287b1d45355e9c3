"""Four small live plots as HTML with inline SVG: some 6 kB and a millisecond each time.

Each card is a title, its number now, a curve and a key. Words are HTML and curves alone are
stretched, so that they fit any width. Text takes its colour from the page, light or dark.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape

from ..records import BatchChangeRecord, StartRecord
from . import quantities as q
from .palette import BLUE, FAINT, GREEN, ORANGE, PURPLE, SKY, STAGE_COLOURS, VERMILLION
from .series import STAGES, settled, stage_names
from .trace import Bucket, Trace

WIDTH, HEIGHT = 300.0, 60.0  # of the drawing, before it is stretched

Curve = Sequence[tuple[float, float]]


def cards(trace: Trace, start: StartRecord, changes: Iterable[BatchChangeRecord]) -> str:
    """Return the four cards as HTML.

    Args:
        trace: the run so far.
        changes: the decisions to mark, oldest first.
    """
    buckets = trace.buckets
    if buckets:
        frame = _Frame(buckets[0].step, buckets[-1].step)
        each = [
            _loss_card(frame, buckets),
            _memory_card(frame, buckets, start),
            _batch_card(frame, buckets, changes, start.processes),
            _time_card(frame, buckets, start),
        ]
    else:  # as high as they will be, so that nothing below moves when they come
        each = [_card(title, "", "", ()) for title in ("Loss", "Memory", "Batch", "Time per step")]
    return (
        '<div style="display:grid;grid-template-columns:repeat(auto-fit,minmax(138px,1fr));'
        'gap:10px 16px;line-height:1.4">' + "".join(each) + "</div>"
    )


def progress_bar(percent: float, label: str, style: str = "") -> str:
    """Return a bar that is full to `percent`, and says so to a screen reader."""
    return (
        f'<div role="progressbar" aria-valuemin="0" aria-valuemax="100" '
        f'aria-valuenow="{percent:.0f}" aria-label="{label}" '
        f'style="height:6px;border-radius:3px;margin:4px 0 10px;{style}'
        'background:rgba(128,128,128,.25)"><div style="height:6px;border-radius:3px;'
        f'width:{percent:.1f}%;background:{BLUE}"></div></div>'
    )


class _Across(dict[float, str]):
    """Where a step stands, as text; looked up, as all curves have the same few steps."""

    def __init__(self, first: int, scale: float) -> None:
        super().__init__()
        self._first, self._scale = first, scale

    def __missing__(self, step: float) -> str:
        self[step] = found = f"{min(WIDTH, (step - self._first) * self._scale):.0f}"
        return found


class _Frame:
    """The drawing's coordinates: steps to the right, a value upwards from `low` to `high`."""

    def __init__(self, first: int, last: int) -> None:
        self._scale = WIDTH / max(1, last - first)
        self.x = _Across(first, self._scale)

    def line(self, points: Curve, low: float, high: float, colour: str, extra: str = "") -> str:
        """Return a polyline; a single point becomes a short dash that can be seen."""
        if not points:
            return ""
        scale = (HEIGHT - 4) / ((high - low) or 1.0)
        ends = (
            points
            if len(points) > 1
            else [*points, (points[0][0] + WIDTH / self._scale, points[0][1])]
        )
        at = self.x
        path = " ".join([f"{at[x]},{HEIGHT - 2 - (y - low) * scale:.1f}" for x, y in ends])
        return (
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.8" '
            f'vector-effect="non-scaling-stroke" {extra}/>'
        )

    def area(self, steps: Sequence[int], heights: Sequence[float], high: float, colour: str) -> str:
        """Return what lies under a curve, down to nothing."""
        at, scale = self.x, (HEIGHT - 2) / (high or 1.0)
        places = zip(steps, heights, strict=True)
        points = " ".join([f"{at[x]},{HEIGHT - y * scale:.0f}" for x, y in places])
        ends = f"{at[steps[-1]]},{HEIGHT:.0f} {at[steps[0]]},{HEIGHT:.0f}"
        return f'<polygon points="{points} {ends}" fill="{colour}"/>'


def _card(
    title: str, now: str, drawing: str, key: Sequence[tuple[str, str]], beside: str = ""
) -> str:
    """Return a card; `beside` stands after the number `now`, in lighter letters."""
    name, number, rest = escape(title), escape(now), escape(beside)
    names = "".join(
        f'<span style="white-space:nowrap"><span style="color:{colour}">■</span> '
        f'<span style="opacity:.8">{said}</span></span>'
        for colour, said in key
    )
    return (
        f'<div style="min-width:0"><div style="opacity:.75">{name}</div>'
        f'<div style="min-height:1.4em;white-space:nowrap"><b>{number}</b>{rest}</div>'
        f'<svg viewBox="0 0 {WIDTH:.0f} {HEIGHT:.0f}" preserveAspectRatio="none" role="img" '
        f'aria-label="{name}: {number}{rest}" style="display:block;width:100%;height:64px;'
        f'border-bottom:1px solid {FAINT}">{drawing}</svg>'
        '<div style="font-size:11px;min-height:2.8em;display:flex;flex-wrap:wrap;'
        'align-content:start;gap:0 8px">'
        f"{names}</div></div>"
    )


def _loss_card(frame: _Frame, buckets: Sequence[Bucket]) -> str:
    known = [bucket for bucket in buckets if bucket.losses]
    means = [(bucket.step, bucket.loss_sum / bucket.losses) for bucket in known]
    peaks = [(bucket.step, bucket.loss_max) for bucket in known]
    if not means:
        return _card("Loss", "no finite loss yet", "", ())
    heights = sorted(y for _, y in peaks)
    low, high = min(y for _, y in means), heights[int(0.97 * (len(heights) - 1))]
    high = max(high, max(y for _, y in means[len(means) // 20 :]))
    drawing = frame.line(means, low, high, BLUE)
    key = [(BLUE, "mean")]
    if buckets[0].steps > 1:
        drawing = frame.line(peaks, low, high, SKY, 'opacity="0.6"') + drawing
        key.append((SKY, "highest"))
    return _card("Loss", q.value(means[-1][1]), drawing, key)


def _memory_card(frame: _Frame, buckets: Sequence[Bucket], start: StartRecord) -> str:
    allocated = _level([(b.step, b.allocated_bytes) for b in buckets], buckets[-1].step)
    reserved = _level([(b.step, b.reserved_bytes) for b in buckets], buckets[-1].step)
    if not allocated and not reserved:
        return _card("Memory", "no reading", "", ())
    whole = _level([(b.step, b.device_used_bytes) for b in buckets], buckets[-1].step)
    budget = start.memory_budget_bytes
    high = max(y for _, y in allocated + reserved) * 1.1
    if whole and max(y for _, y in whole) > 3 * high:  # others hold more than could be shown beside
        whole = []
    high = max([high, *(1.05 * y for _, y in whole)])
    key = [(BLUE, "allocated")] * bool(allocated) + [(ORANGE, "reserved")] * bool(reserved)
    key += [(PURPLE, "whole device")] * bool(whole)
    limit = ""
    if budget is not None and budget <= 3 * high:
        high = max(high, 1.05 * budget)
        level = [(buckets[0].step, float(budget)), (buckets[-1].step, float(budget))]
        limit = frame.line(level, 0, high, VERMILLION, 'stroke-dasharray="4 3"')
        key.append((VERMILLION, "budget"))
    curves = ((whole, PURPLE), (reserved, ORANGE), (allocated, BLUE))
    drawing = "".join(frame.line(points, 0, high, colour) for points, colour in curves) + limit
    now = q.size((allocated or reserved)[-1][1])
    return _card("Memory", now, drawing, key, f" of {q.size(budget)}" if budget else "")


def _level(readings: Iterable[tuple[int, int | None]], last: int) -> list[tuple[float, float]]:
    """Return the corners of what stays level for long; read now and then, it is drawn to `last`."""
    corners: list[tuple[float, float]] = []
    for step, reading in readings:
        if reading is None:
            continue
        if len(corners) > 1 and corners[-1][1] == corners[-2][1] == reading:
            corners[-1] = (step, reading)
        else:
            corners.append((step, reading))
    return [*corners, (last, corners[-1][1])] if corners else corners


def _batch_card(
    frame: _Frame,
    buckets: Sequence[Bucket],
    changes: Iterable[BatchChangeRecord],
    processes: int,
) -> str:
    sizes = settled([bucket.global_batch_size for bucket in buckets])
    micro_sizes = settled([bucket.microbatch_size for bucket in buckets])
    whole = _staircase(buckets, sizes)
    micro = _staircase(buckets, micro_sizes)
    low = min(y for _, y in micro + whole) - 0.5
    high = max(y for _, y in whole + micro) + 0.5
    marks, marked = [], set()
    for made in changes:
        if made.step >= buckets[0].step:
            x = frame.x[made.step]
            colour = {"micro": ORANGE, "control": PURPLE}.get(made.what, GREEN)
            marked.add(colour)
            marks.append(
                f'<line x1="{x}" x2="{x}" y1="0" y2="{HEIGHT:.0f}" stroke="{colour}" '
                f'stroke-dasharray="2 3" vector-effect="non-scaling-stroke">'
                f"<title>step {made.step}: {escape(made.reason)}</title></line>"
            )
    drawing = "".join(marks) + frame.line(whole, low, high, BLUE)
    drawing += frame.line(micro, low, high, ORANGE, 'stroke-dasharray="5 5"')  # both where equal
    pieces = -(-sizes[-1] // max(1, micro_sizes[-1] * processes))
    even = sizes[-1] == pieces * micro_sizes[-1] * processes
    now = q.batch(sizes[-1], micro_sizes[-1], pieces, processes)
    now = now if even else f"{q.count(sizes[-1])} in {q.count(pieces * processes)} pieces"
    key = [(BLUE, "global"), (ORANGE, "micro")]
    key += [(GREEN, "decision")] * (GREEN in marked) + [(PURPLE, "yours")] * (PURPLE in marked)
    return _card("Batch", now, drawing, key)


def _staircase(buckets: Sequence[Bucket], sizes: Sequence[int]) -> list[tuple[float, float]]:
    """Return the corners, with the sizes as powers of two."""
    corners = [(float(buckets[0].step), math.log2(sizes[0] or 1))]
    for bucket, size in zip(buckets, sizes, strict=True):
        height = math.log2(size or 1)
        if height != corners[-1][1]:
            corners += [(bucket.step, corners[-1][1]), (bucket.step, height)]
    return [*corners, (buckets[-1].step, corners[-1][1])]


def _time_card(frame: _Frame, buckets: Sequence[Bucket], start: StartRecord) -> str:
    timed = [bucket for bucket in buckets if bucket.timed]
    if not timed:
        return _card("Time per step", "no reading", "", ())
    totals = [bucket.step_sum_s / bucket.timed for bucket in timed]
    high = 1.1 * sorted(totals)[int(0.97 * (len(totals) - 1))]
    steps = [bucket.step for bucket in timed]
    floor = [0.0] * len(timed)
    drawing, key = "", []
    for at, (name, colour) in enumerate(zip(stage_names(start), STAGE_COLOURS, strict=True)):
        if at < len(STAGES):
            ceiling = [y + b.stage_sums_s[at] / b.timed for y, b in zip(floor, timed, strict=True)]
        else:
            ceiling = list(map(max, floor, totals))
        if ceiling != floor:
            drawing = frame.area(steps, ceiling, high, colour) + drawing  # before what hides it
            key.append((colour, name))
        floor = ceiling
    return _card("Time per step", q.duration(totals[-1]), drawing, key)

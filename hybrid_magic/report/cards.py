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
from .series import STAGES, settled
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
            _batch_card(frame, buckets, changes),
            _time_card(frame, buckets),
        ]
    else:  # as high as they will be, so that nothing below moves when they come
        each = [_card(title, "", "", ()) for title in ("Loss", "Memory", "Batch", "Time per step")]
    return (
        '<div style="display:grid;grid-template-columns:repeat(auto-fit,minmax(138px,1fr));'
        'gap:10px 16px;line-height:1.4">' + "".join(each) + "</div>"
    )


class _Frame:
    """The drawing's coordinates: steps to the right, a value upwards from `low` to `high`."""

    def __init__(self, first: int, last: int) -> None:
        self._first, self._scale = first, WIDTH / max(1, last - first)
        self._known: dict[float, str] = {}  # all curves have the same few steps

    def x(self, step: float) -> str:
        known = self._known.get(step)
        if known is None:
            known = self._known[step] = f"{min(WIDTH, (step - self._first) * self._scale):.0f}"
        return known

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
        path = " ".join([f"{at(x)},{HEIGHT - 2 - (y - low) * scale:.1f}" for x, y in ends])
        return (
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.8" '
            f'vector-effect="non-scaling-stroke" {extra}/>'
        )

    def area(self, ceiling: Curve, high: float, colour: str) -> str:
        """Return what lies under a curve, down to nothing."""
        at, scale = self.x, (HEIGHT - 2) / (high or 1.0)
        points = " ".join([f"{at(x)},{HEIGHT - y * scale:.0f}" for x, y in ceiling])
        ends = f"{at(ceiling[-1][0])},{HEIGHT:.0f} {at(ceiling[0][0])},{HEIGHT:.0f}"
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
    allocated = [
        (b.step, float(b.allocated_bytes)) for b in buckets if b.allocated_bytes is not None
    ]
    reserved = [(b.step, float(b.reserved_bytes)) for b in buckets if b.reserved_bytes is not None]
    if not allocated and not reserved:
        return _card("Memory", "no reading", "", ())
    now, last = (allocated or reserved)[-1][1], buckets[-1].step
    for readings in filter(None, (allocated, reserved)):
        readings.append((last, readings[-1][1]))  # read now and then, and drawn to the edge
    budget = start.memory_budget_bytes
    high = max(y for _, y in allocated + reserved) * 1.1
    drawing = frame.line(reserved, 0, high, ORANGE) if reserved else ""
    drawing += frame.line(allocated, 0, high, BLUE)
    key = [(BLUE, "allocated")] * bool(allocated) + [(ORANGE, "reserved")] * bool(reserved)
    if budget is not None and budget <= 3 * high:
        high = max(high, 1.05 * budget)
        level = [(buckets[0].step, float(budget)), (buckets[-1].step, float(budget))]
        drawing = (
            frame.line(reserved, 0, high, ORANGE)
            + frame.line(allocated, 0, high, BLUE)
            + frame.line(level, 0, high, VERMILLION, 'stroke-dasharray="4 3"')
        )
        key.append((VERMILLION, "budget"))
    return _card("Memory", q.size(now), drawing, key, f" of {q.size(budget)}" if budget else "")


def _batch_card(
    frame: _Frame, buckets: Sequence[Bucket], changes: Iterable[BatchChangeRecord]
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
            x = frame.x(made.step)
            colour = {"micro": ORANGE, "control": PURPLE}.get(made.what, GREEN)
            marked.add(colour)
            marks.append(
                f'<line x1="{x}" x2="{x}" y1="0" y2="{HEIGHT:.0f}" stroke="{colour}" '
                f'stroke-dasharray="2 3" vector-effect="non-scaling-stroke">'
                f"<title>step {made.step}: {escape(made.reason)}</title></line>"
            )
    drawing = "".join(marks) + frame.line(whole, low, high, BLUE)
    drawing += frame.line(micro, low, high, ORANGE, 'stroke-dasharray="5 5"')  # both where equal
    pieces = -(-sizes[-1] // max(1, micro_sizes[-1]))
    even = sizes[-1] == pieces * micro_sizes[-1]
    now = q.batch(sizes[-1], micro_sizes[-1], pieces)
    now = now if even else f"{q.count(sizes[-1])} in {q.count(pieces)} pieces"
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


def _time_card(frame: _Frame, buckets: Sequence[Bucket]) -> str:
    timed = [bucket for bucket in buckets if bucket.timed]
    if not timed:
        return _card("Time per step", "no reading", "", ())
    totals = [bucket.step_sum_s / bucket.timed for bucket in timed]
    high = 1.1 * sorted(totals)[int(0.97 * (len(totals) - 1))]
    floor = [(bucket.step, 0.0) for bucket in timed]
    drawing, key = "", []
    for at, (name, colour) in enumerate(zip((*STAGES, "other"), STAGE_COLOURS, strict=True)):
        if at < len(STAGES):
            spent = [bucket.stage_sums_s[at] / bucket.timed for bucket in timed]
            ceiling = [(x, y + more) for (x, y), more in zip(floor, spent, strict=True)]
        else:
            ceiling = [(x, max(y, total)) for (x, y), total in zip(floor, totals, strict=True)]
        if ceiling != floor:
            drawing = frame.area(ceiling, high, colour) + drawing  # each before what hides it
            key.append((colour, name))
        floor = ceiling
    return _card("Time per step", q.duration(totals[-1]), drawing, key)

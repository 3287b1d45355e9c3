"""The four plots of a run: loss, memory, batch sizes with their decisions, time per step by stage.

Colours are Okabe and Ito's, told apart by colour-blind eyes too; the ground is white, so that it
reads in light and dark pages. matplotlib is imported when a figure is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..records import BatchChangeRecord
from ..run import Run
from . import quantities as q
from . import series, sheet
from .palette import (
    BLUE,
    GREEN,
    INK,
    ORANGE,
    PURPLE,
    SKY,
    STAGE_COLOURS,
    VERMILLION,
)
from .series import STAGES, Point
from .sheet import nothing
from .sheet import png as png

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_NAMED_CHANGES = 8


def figure(run: Run) -> Figure:
    """Return the run's four plots as a Figure that shows itself as a PNG in a notebook."""

    def draw(all_four: list[Axes]) -> None:
        for one, axes in zip((_loss, _memory, _sizes, _times), all_four, strict=True):
            axes.margins(x=0.02)
            one(axes, run)
            axes.set_xlabel("optimizer step")
            axes.locator_params(axis="x", nbins=5, integer=True)

    return sheet.figure(draw)


def _loss(axes: Axes, run: Run) -> None:
    points = series.finite_points(run.history, lambda record: record.loss)
    axes.set_ylabel("loss")
    if not points:
        nothing(
            axes, "Loss", "no finite loss was seen" if len(run.history) else "no step was taken"
        )
        return
    smooth = series.smoothed(points)
    _curve(axes, series.thinned(points), color=SKY, alpha=0.55, linewidth=1, label="every step")
    _curve(axes, series.thinned(smooth), color=BLUE, label="smoothed")
    checks = series.validations(run)
    if checks:
        _curve(
            axes,
            checks,
            color=VERMILLION,
            marker="o",
            markersize=6 if len(checks) < 15 else 3.5,
            linewidth=1.2,
            label="validation",
        )
    shown = sorted(value for _, value in points)
    top = max(
        [shown[int(0.98 * (len(shown) - 1))], *(y for _, y in smooth[1:]), *(y for _, y in checks)]
    )
    low = min(shown[0], *(y for _, y in checks), top)
    if top > low:
        axes.set_ylim(low - 0.05 * (top - low), top + 0.12 * (top - low))
    skipped = [record.step for record in run.history if record.skipped]
    if skipped:
        axes.plot(
            skipped,
            [0.02] * len(skipped),
            "x",
            color=INK,
            label="skipped",
            transform=axes.get_xaxis_transform(),
        )
    title = f"Loss {q.value(smooth[0][1])} → {q.value(smooth[-1][1])}"
    axes.set_title(title + (f", validation {q.value(checks[-1][1])}" if checks else ""))
    axes.legend(loc="upper right")


def _memory(axes: Axes, run: Run) -> None:
    allocated = series.finite_points(run.history, lambda record: record.allocated_peak_bytes)
    reserved = series.finite_points(run.history, lambda record: record.reserved_peak_bytes)
    highest = max((value for _, value in allocated + reserved), default=0.0)
    if not highest:
        nothing(axes, "Memory", "no reading on this device")
        return
    whole = series.finite_points(run.telemetry, lambda record: record.gpu_used_bytes)
    power, unit = (30, "GiB") if highest >= 1 << 30 else (20, "MiB")
    axes.set_ylabel(f"peak memory ({unit})")
    top, above = highest, []
    fullest = max((value for _, value in whole), default=0.0)
    if fullest > 2.5 * highest:  # others hold more than could be shown beside
        above.append(f"whole device {q.size(fullest)}")
        whole = []
    curves = (
        (whole, PURPLE, "whole device"),
        (reserved, ORANGE, "reserved"),
        (allocated, BLUE, "allocated"),
    )
    for points, colour, name in curves:
        if points:
            scaled = [(x, y / (1 << power)) for x, y in series.thinned(points)]
            _curve(axes, scaled, color=colour, label=name, drawstyle="steps-post")
        top = max([top, *(value for _, value in points)])
    start = run.start
    budget, device = (start.memory_budget_bytes, start.device_bytes) if start else (None, None)
    limits = ((budget, "budget", VERMILLION, "--"), (device, "capacity", INK, ":"))
    for limit, name, colour, dashes in limits:
        if limit is None:
            continue
        if limit <= 2.5 * highest:
            axes.axhline(
                limit / (1 << power), color=colour, linestyle=dashes, linewidth=1.4, label=name
            )
            top = max(top, limit)
        else:
            above.append(f"{name} {q.size(limit)}")
    if above:
        said = ", ".join(above) if len(above) < 3 else f"{above[0]},\n   {', '.join(above[1:])}"
        axes.text(
            0.02,
            0.97,
            f"↑ {said}",
            transform=axes.transAxes,
            va="top",
            fontsize=10.5,
        )
    axes.set_ylim(0, top * (1.22 if len(above) < 3 else 1.32) / (1 << power))
    title = f"Memory {q.size(highest)}"
    axes.set_title(title + (f", {q.share(highest / budget)} of budget" if budget else ""))
    tight = {"columnspacing": 0.8, "handlelength": 1.2, "handletextpad": 0.5}
    axes.legend(loc="lower right", ncol=3, **tight)


def _sizes(axes: Axes, run: Run) -> None:
    from matplotlib.ticker import FuncFormatter, NullLocator

    axes.set_ylabel("samples")
    if not len(run.history):
        nothing(axes, "Batch sizes", "no step was taken")
        return
    steps = [record.step for record in run.history]
    whole = series.stairs(steps, [record.global_batch_size for record in run.history])
    micro = series.stairs(steps, [record.microbatch_size for record in run.history])
    _curve(axes, whole, color=BLUE, drawstyle="steps-post", linewidth=2.2, label="global batch")
    dashed = {"linestyle": (0, (4, 3)), "label": "micro-batch"}  # both are seen where equal
    _curve(axes, micro, color=ORANGE, drawstyle="steps-post", **dashed)
    seen = [y for _, y in whole + micro]
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(
        FuncFormatter(lambda size, _: q.count(size) if size >= 1 else "")
    )
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_ylim(min(seen) / 1.6, max(seen) * 3.2)
    sized = [made for made in run.changes if made.what == "global"]
    kinds = (
        ("grew", "^", GREEN, [made for made in sized if _up(made)]),
        ("shrank", "v", VERMILLION, [made for made in sized if not _up(made)]),
        ("you asked", "D", PURPLE, [made for made in run.changes if made.what == "control"]),
        ("precision", "s", INK, [made for made in run.changes if made.what == "precision"]),
    )
    for name, marker, colour, made in kinds:
        if made:
            at = [(change.step, series.height_at(whole, change.step)) for change in made]
            _curve(
                axes,
                at,
                color=colour,
                linestyle="none",
                marker=marker,
                markersize=7,
                zorder=3,
                label=name,
            )
    _name_changes(axes, sized, whole)
    first, last = whole[0][1], whole[-1][1]
    far = max((y for _, y in whole), key=lambda y: abs(math.log(y / first)))
    through = [first, far, last] if far not in (first, last) else [first, last]
    said = (
        f"Batch stayed at {q.count(first)}"
        if first == last == far
        else "Batch " + " → ".join(map(q.count, through))
    )
    number = len(run.changes)
    axes.set_title(f"{said}, {number or 'no'} decision{'' if number == 1 else 's'}")
    axes.legend(loc="upper left", ncol=3, columnspacing=1.0, handletextpad=0.5)


def _name_changes(axes: Axes, made: Sequence[BatchChangeRecord], whole: Sequence[Point]) -> None:
    """Write "64 → 96" at the largest changes, leaving out those too close to one already named."""
    span = max(whole[-1][0] - whole[0][0], 1)
    named: list[float] = []
    for change in sorted(made, key=_leap, reverse=True):
        if len(named) == MOST_NAMED_CHANGES:
            return
        if any(abs(change.step - step) < 0.2 * span for step in named):
            continue
        named.append(change.step)
        late = change.step - whole[0][0] > 0.8 * span
        axes.annotate(
            q.change(change.before, change.after),
            (change.step, max(float(change.before or 1), float(change.after or 1))),
            xytext=(4 if late else 0, 7),
            textcoords="offset points",
            ha="right" if late else "center",
            fontsize=10,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5},
        )


def _times(axes: Axes, run: Run) -> None:
    axes.set_ylabel("ms per step")
    bars = series.stage_bars(run.history)
    if not bars:
        nothing(axes, "Time per step", "no reading")
        return
    at_steps = [bar.step for bar in bars]
    names = series.stage_names(run.start)
    totals = [sum(bar.stages_ms[at] * bar.steps for bar in bars) for at in range(len(names))]
    floor = [0.0] * len(bars)
    for at, (name, colour) in enumerate(zip(names, STAGE_COLOURS, strict=True)):
        if not totals[at]:
            continue
        ceiling = [low + bar.stages_ms[at] for low, bar in zip(floor, bars, strict=True)]
        if len(bars) == 1:
            axes.bar(
                at_steps, ceiling[0] - floor[0], bottom=floor, color=colour, label=name, width=0.6
            )
        else:
            axes.fill_between(at_steps, floor, ceiling, color=colour, label=name, linewidth=0)
        floor = ceiling
    usual = sorted(floor)[int(0.95 * (len(floor) - 1))]
    axes.set_ylim(0, usual * 1.45 or 1)
    longest = max(range(len(STAGES)), key=totals.__getitem__)
    title = f"{q.duration(sum(totals) / sum(bar.steps for bar in bars) / 1e3)} per step"
    if totals[longest]:
        title += f", {q.share(totals[longest] / sum(totals))} {names[longest]}"
    axes.set_title(title)
    axes.legend(loc="upper left", ncol=3, columnspacing=1.0, handlelength=1.2, handletextpad=0.5)


def _curve(axes: Axes, points: Sequence[Point], **how: Any) -> None:
    if len(points) == 1:
        how = {"marker": "o", **how}
    axes.plot([x for x, _ in points], [y for _, y in points], **how)


def _up(made: BatchChangeRecord) -> bool:
    return isinstance(made.before, int) and isinstance(made.after, int) and made.after > made.before


def _leap(made: BatchChangeRecord) -> float:
    if (
        not isinstance(made.before, int)
        or not isinstance(made.after, int)
        or min(made.before, made.after) < 1
    ):
        return 0.0
    return abs(math.log(made.after / made.before))

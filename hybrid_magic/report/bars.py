"""The figure of an ablation: training time, peak memory and accuracy, a row a variant.

Bars are means, dots are seeds, whiskers 95 % intervals. Drawn as the plots of a run are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..ablation import Ablation, Row
from . import quantities as q
from . import verdicts
from .palette import BLUE, FAINT, INK, SKY, STYLE
from .sheet import bare, blank
from .sheet import png as png

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WIDTH, _ROW, _AROUND = 8.6, 0.42, 0.95  # inches


def figure(ablation: Ablation) -> Figure:
    """Return time, memory and accuracy of the variants as a Figure."""
    import matplotlib as mpl

    rows = ablation.variants
    with mpl.rc_context(STYLE):
        sheet = blank(_WIDTH, _AROUND + _ROW * max(2, len(rows)), layout="constrained")
        known = any(row.peak_allocated_bytes is not None for row in rows)  # not on a CPU
        time, *memory, accuracy = sheet.subplots(1, 2 + known, sharey=True)
        _bars(time, ablation, rows, "Training time", "seconds", q.seconds)
        for axes in memory:
            _bars(axes, ablation, rows, "Peak memory", "peak_allocated_bytes", q.size)
        _dots(accuracy, ablation, rows)
        time.set_yticks(range(len(rows)), [row.name for row in rows])
        time.set_ylim(len(rows) - 0.45, -0.55)
        sheet.canvas.draw()  # the layout is settled while the style holds
    return sheet


def _bars(
    axes: Axes,
    ablation: Ablation,
    rows: list[Row],
    title: str,
    name: str,
    said: Callable[[float], str],
) -> None:
    axes.set_title(title)
    bare(axes)
    known = [getattr(trial, name) or 0 for trial in ablation.trials]
    longest = float(max(known, default=0)) or 1.0
    for at, row in enumerate(rows):
        mean = getattr(row, name)
        if mean is None:
            axes.text(0.02 * longest, at, _missing(row), va="center", color=INK, fontsize=10)
            continue
        axes.barh(at, mean, height=0.62, color=_colour(at, row))
        end = max(_seeds(axes, ablation, row, at, name), default=mean)
        axes.text(
            max(mean, end) + 0.03 * longest, at, said(mean), va="center", fontsize=10, color=INK,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8, "alpha": 0.8},
        )  # fmt: skip
    axes.set_xlim(0, 1.42 * longest)
    axes.set_xticks([])


def _dots(axes: Axes, ablation: Ablation, rows: list[Row]) -> None:
    axes.set_title("Accuracy, %")
    scale = verdicts.points_per_unit(ablation)
    bare(axes)
    known = [scale * row.accuracy for row in rows if row.accuracy is not None]
    if not known:
        axes.set_xticks([])
        axes.text(0.5, 0.5, "none was given", transform=axes.transAxes, ha="center", color=INK)
        return
    axes.grid(True, axis="x")
    for at, row in enumerate(rows):
        if row.accuracy is None:
            continue
        mean = scale * row.accuracy
        _seeds(axes, ablation, row, at, "accuracy", scale)
        if row.accuracy.low is not None and row.accuracy.high is not None:
            ends = scale * row.accuracy.low, scale * row.accuracy.high
            axes.plot(ends, (at, at), color=_colour(at, row), linewidth=2.4)
        axes.plot(mean, at, "o", color=_colour(at, row), markersize=8)
    low, high = axes.get_xlim()
    if high - low < 1:  # a difference of a tenth of a point must not look like a gulf
        axes.set_xlim((low + high - 1) / 2, (low + high + 1) / 2)
    axes.locator_params(axis="x", nbins=4)


def _seeds(
    axes: Axes, ablation: Ablation, row: Row, at: int, name: str, scale: float = 1.0
) -> list[float]:
    """Draw a dot a seed, where there are several; return the values."""
    values = [
        scale * value
        for trial in ablation.trials
        if trial.variant == row.name and (value := getattr(trial, name)) is not None
    ]
    if len(values) > 1:
        above: Any = [at - 0.2] * len(values)
        axes.plot(values, above, "o", color=INK, markersize=3, alpha=0.7, linestyle="none")
    return values


def _colour(at: int, row: Row) -> str:
    return FAINT if at == 0 else BLUE if row.name == "hybrid" else SKY


def _missing(row: Row) -> str:
    return {"oom": "out of memory", "none": "not run"}.get(row.outcome, "no reading")

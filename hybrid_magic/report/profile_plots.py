"""The figure of a profile: time by stage and by module, memory by stage and by micro-batch size.

A stage and what it leaves in memory share a colour: activations are the forward pass's, gradients
the backward pass's. What was not measured is said in words. Drawn as the plots of a run are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..findings import KINDS, STAGES, Fit, MemoryLine
from ..profiles import Profile
from . import quantities as q
from . import sheet
from .palette import BLUE, FAINT, GREEN, INK, ORANGE, PURPLE, SKY, VERMILLION
from .profile_tree import parts
from .sheet import bare, nothing
from .sheet import png as png

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_OF_STAGES, _OF_KINDS = (SKY, GREEN, BLUE, ORANGE, PURPLE), (GREEN, ORANGE, PURPLE, BLUE, SKY)
STAGE_COLOURS: dict[str, str] = dict(zip(STAGES, (*_OF_STAGES, FAINT), strict=True))
KIND_COLOURS: dict[str, str] = dict(zip(KINDS, (*_OF_KINDS, FAINT), strict=True))
MODULES = 9  # rows of the tree that the figure's are taken from
_LETTERS = 18  # of a name at the left
_LINE = 12.0  # points, of a line of what is written
_SMALL = 9.8  # points, of what is written into a plot


def figure(profile: Profile) -> Figure:
    """Return the profile's four plots as a Figure that shows itself as a PNG in a notebook."""

    def draw(all_four: list[Axes]) -> None:
        for one, axes in zip((_stages, _modules, _kinds, _sizes), all_four, strict=True):
            one(axes, profile)

    return sheet.figure(draw)


def _stages(axes: Axes, profile: Profile) -> None:
    if not profile.stages:
        nothing(axes, "Time by stage", "no reading")
        return
    axes.set_title(f"Time by stage, {q.brief(profile.step_s)}")
    longest = max(max(stage.seconds, stage.host_seconds or 0.0) for stage in profile.stages)
    apart = any(stage.host_seconds is not None for stage in profile.stages)
    for at, stage in enumerate(profile.stages):
        said = f"{q.brief(stage.seconds)}, {q.share(stage.seconds / profile.step_s)}"
        height = 0.5 if apart else 0.62
        middle = at - 0.12 if apart else at
        axes.barh(middle, stage.seconds, height, color=STAGE_COLOURS.get(stage.name, FAINT))
        _beside(axes, max(stage.seconds, stage.host_seconds or 0.0), at, longest, said)
        if stage.host_seconds is not None:
            axes.barh(at + 0.24, stage.host_seconds, 0.16, color=INK)
    _rows(axes, [stage.name for stage in profile.stages])
    _bare(axes, 1.5 * longest)
    if apart:
        _key(axes, [(INK, "host time")])


def _modules(axes: Axes, profile: Profile) -> None:
    rows = parts(profile.modules, profile.model, MODULES)
    if not rows:
        nothing(axes, "Time by module", "no module was timed")
        return
    axes.set_title("Time by module")
    longest = max(row.module.seconds or 0.0 for row in rows)
    for at, row in enumerate(rows):
        forward, backward = row.module.forward_s or 0.0, row.module.backward_s or 0.0
        axes.barh(at, forward, 0.62, color=BLUE)
        axes.barh(at, backward, 0.62, left=forward, color=ORANGE)
        _beside(axes, forward + backward, at, longest, q.brief(row.module.seconds))
    _rows(axes, [row.label for row in rows])
    _bare(axes, 1.35 * longest)
    _key(axes, [(BLUE, "forward"), (ORANGE, "backward")])


def _kinds(axes: Axes, profile: Profile) -> None:
    highest = profile.peak
    if highest is None:
        nothing(axes, "Memory by stage", "no reading on this device")
        return
    axes.set_title("Memory by stage")
    for at, peak in enumerate(profile.peaks):
        floor = 0
        for name, colour in KIND_COLOURS.items():
            amount = peak.kinds.get(name, 0)
            axes.barh(at, amount, 0.62, left=floor, color=colour)
            floor += amount
        _beside(axes, peak.total_bytes, at, highest.total_bytes, q.size(peak.total_bytes))
    _rows(axes, [peak.stage for peak in profile.peaks])
    _bare(axes, 1.35 * highest.total_bytes)
    present = [name for name in KIND_COLOURS if any(peak.kinds.get(name) for peak in profile.peaks)]
    _key(axes, [(KIND_COLOURS[name], name) for name in present])


def _sizes(axes: Axes, profile: Profile) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    tried = [(size.samples, size.peak_bytes) for size in profile.sizes if size.peak_bytes]
    line = profile.line
    if not tried and line is None:
        nothing(axes, "Memory by micro-batch", "no reading on this device")
        return
    axes.set_title("Memory by micro-batch")
    fits = line.fits if line else ()
    sizes = [size for size, _ in tried] + [fit.largest for fit in fits if fit.largest]
    left, right = min(sizes, default=1), max(sizes, default=1)
    base = 2 if right < 1 << 14 else 10
    axes.set_xscale("log", base=base)
    axes.set_yscale("log", base=2)
    if line is not None:
        _curve(axes, line, left, right)
    if tried:
        axes.plot(*zip(*tried, strict=True), "o", color=BLUE, markersize=6)
    axes.xaxis.set_major_locator(LogLocator(base=base, numticks=6))
    axes.yaxis.set_major_locator(LogLocator(base=2, numticks=6))
    ticks = FuncFormatter(lambda size, _: _samples(size) if 1 <= size <= right else "")
    axes.xaxis.set_major_formatter(ticks)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda size, _: q.size(size).replace(".0", "")))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())
    axes.set_xlabel("samples in a micro-batch")
    if fits:
        _limits(axes, fits)
        axes.set_xlim(left=max(0.12, left * (left / right) ** 0.25))  # room for the list


def _samples(size: float) -> str:
    """Return a tick of samples, short: 256, 10 k, 1 M."""
    if size < 1e4:
        return q.count(size)
    return f"{size / 1e3:g} k" if size < 1e6 else f"{size / 1e6:g} M"


def _curve(axes: Axes, line: MemoryLine, left: float, right: float) -> None:
    """Draw the line through the peaks, which is a curve where both axes are logarithmic."""
    many = [left * (right / left) ** (at / 40) for at in range(41)]
    height = [line.fixed_bytes + line.per_sample_bytes * size for size in many]
    seen = [(x, y) for x, y in zip(many, height, strict=True) if y > 0]
    if seen:
        axes.plot(*zip(*seen, strict=True), color=SKY, zorder=1)


def _limits(axes: Axes, fits: Sequence[Fit]) -> None:
    """Mark where each budget cuts the line, the first is this device's; list the largest sizes."""
    here = fits[0]
    axes.axhline(here.budget_bytes, color=VERMILLION, linestyle="--", linewidth=1.3)
    falling = sorted(fits, key=lambda fit: fit.budget_bytes, reverse=True)
    for fit in falling:
        if fit.largest:
            colour = VERMILLION if fit is here else INK
            axes.plot(fit.largest, fit.budget_bytes, "D", color=colour, markersize=4.5)
    low, high = axes.get_ylim()
    axes.set_ylim(low, high * (high / low) ** 0.05)
    lines = [("\N{BLACK DIAMOND} the most that fits:", INK)]
    for fit in falling:
        most = q.count(fit.largest) if fit.largest else "none"
        lines.append((f"{most} on {_cut(fit.device)}", VERMILLION if fit is here else INK))
    for at, (said, colour) in enumerate(lines):
        axes.annotate(
            said, (0.02, 0.99), (0, -_LINE * at), "axes fraction", textcoords="offset points",
            va="top", fontsize=_SMALL, color=colour,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.2},
        )  # fmt: skip


def _rows(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), [_cut(name) for name in names])
    axes.set_ylim(max(len(names), 3) - 0.4, -0.6)


def _cut(name: str) -> str:
    """Return a name, of a long one the end, which tells paths apart."""
    return name if len(name) <= _LETTERS else f"…{name[1 - _LETTERS :]}"


def _bare(axes: Axes, right: float) -> None:
    bare(axes)
    axes.set_xlim(0, right or 1.0)
    axes.set_xticks([])


def _beside(axes: Axes, end: float, at: float, longest: float, said: str) -> None:
    axes.text(end + 0.02 * longest, at, said, va="center", fontsize=_SMALL)


def _key(axes: Axes, names: Sequence[tuple[str, str]]) -> None:
    """Write what the colours are below the plot."""
    from matplotlib.patches import Patch

    axes.legend(
        handles=[Patch(color=colour, label=name) for colour, name in names],
        loc="upper center",
        bbox_to_anchor=(0.42, 0.02),
        ncol=3,
        columnspacing=1.0,
        handlelength=1.0,
        handletextpad=0.5,
    )

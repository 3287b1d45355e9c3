"""What a profile says in tables: rows of words, a column for each thing that is known.

Knows no layout: text and HTML are both made of these.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..findings import KINDS, STAGES, HostRead
from ..profiles import Profile
from . import profile_words
from . import quantities as q
from .profile_tree import Branch

LONGEST_NAME = 30  # letters of a module's name; the middle of a longer one is left out


@dataclass(frozen=True, slots=True)
class Table:
    """Rows under `heads`, the first `words` columns left-aligned; no column is empty.

    `summed`: the last row is the whole of those above it.
    """

    title: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: int = 1
    summed: bool = False


def stages(profile: Profile) -> Table:
    """Return time and memory of each stage, and of the whole step."""
    apart = any(stage.host_seconds is not None for stage in profile.stages)
    peaks = {peak.stage: peak.total_bytes for peak in profile.peaks}
    timed = {stage.name: stage for stage in profile.stages}
    rows = []
    for name in _ordered({**timed, **peaks}, STAGES):
        stage, peak = timed.get(name), _size(peaks.get(name))
        if stage is None:
            rows.append((name, "", "", "", peak))
        else:
            share = q.share(stage.seconds / profile.step_s)
            time = _spread(stage.seconds, stage.spread)
            rows.append((name, time, share, _duration(stage.host_seconds), peak))
    highest = _size(profile.peak.total_bytes if profile.peak else None)
    whole = _spread(profile.step_s, profile.step_spread_s)
    rows.append(("whole step", whole, q.share(1.0), "", highest))
    heads = ("stage", "device time" if apart else "time", "share", "host time", "peak memory")
    return _table("Time and memory by stage", heads, rows, summed=True)


def modules(profile: Profile, rows: Sequence[Branch]) -> Table:
    """Return the given rows of the model's tree, and what was outside of any module."""
    cells = []
    for row in rows:
        module = row.module
        cells.append(
            (
                2 * row.depth * "\N{NO-BREAK SPACE}" + shortened(row.name),
                shortened(module.kind) if module.path else "",
                _duration(module.seconds),
                _part(module.seconds, profile.step_s),
                _duration(module.forward_s),
                _duration(module.backward_s),
                _size(module.parameter_bytes),
                _size(module.activation_bytes),
                _size(module.peak_bytes),
                "" if module.flops is None else q.flops(module.flops),
            )
        )
    if profile.outside_s is not None:
        spent = _duration(profile.outside_s), _part(profile.outside_s, profile.step_s)
        cells.append(("outside of modules", "", *spent, *[""] * 6))
    times = ("time", "share", "forward", "backward")
    sizes = ("parameters", "activations", "peak", "FLOPs")
    heads = ("module", "kind", *times, *sizes)
    return _table("Time and memory by module, in a step", heads, cells, words=2)


def kinds(profile: Profile) -> Table:
    """Return what the memory was at its peak."""
    peak = profile.peak
    if peak is None:
        return _table("", (), [])
    rows = [
        (name, q.size(peak.kinds[name]), _part(peak.kinds[name], peak.total_bytes))
        for name in _ordered(peak.kinds, KINDS)
        if peak.kinds[name]
    ]
    rows.append(("at the peak", q.size(peak.total_bytes), q.share(1.0)))
    heads = ("kind", "memory", "share")
    return _table(
        f"Memory at its peak, {profile_words.place(peak.stage)}", heads, rows, summed=True
    )


def fits(profile: Profile) -> Table:
    """Return the largest micro-batch here and on other cards."""
    line = profile.line
    rows = [
        (
            fit.device,
            q.size(fit.budget_bytes),
            "does not fit" if fit.largest is None else q.count(fit.largest),
        )
        for fit in (line.fits if line else ())
    ]
    return _table("The largest micro-batch", ("device", "budget", "samples"), rows)


def sizes(profile: Profile) -> Table:
    """Return the micro-batches that were tried, where there were several."""
    rows = [
        (
            q.count(size.samples),
            _duration(size.seconds),
            q.rate(size.samples / size.seconds if size.seconds else None),
            _size(size.peak_bytes),
        )
        for size in (profile.sizes if len(profile.sizes) > 1 else ())
    ]
    return _table("Micro-batches tried", ("samples", "time", "speed", "peak memory"), rows, words=0)


def reads(profile: Profile) -> Table:
    """Return the lines that make the host wait for the device."""
    rows = [_read(read) for read in profile.reads]
    heads = ("line", "a micro-batch", "wait in a step")
    return _table("Lines where the host waits for the device", heads, rows)


def _read(read: HostRead) -> tuple[str, str, str]:
    times = f"{read.times:.3g}"
    return read.where, f"{times} time{'' if times == '1' else 's'}", q.brief(read.seconds)


def shortened(name: str) -> str:
    """Return a name with the middle left out where it is long."""
    half = LONGEST_NAME // 2
    return name if len(name) <= LONGEST_NAME else f"{name[: half - 1]}…{name[-half:]}"


def _table(
    title: str,
    heads: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    words: int = 1,
    summed: bool = False,
) -> Table:
    """Return a table without the columns in which no row has a word."""
    kept = [at for at in range(len(heads)) if any(row[at] for row in rows)]
    return Table(
        title,
        tuple(heads[at] for at in kept),
        tuple(tuple(row[at] for at in kept) for row in rows),
        sum(at < words for at in kept),
        summed,
    )


def _ordered(names: Iterable[str], usual: Sequence[str]) -> list[str]:
    held = list(names)
    return [name for name in usual if name in held] + [name for name in held if name not in usual]


def _spread(seconds: float, spread: float | None) -> str:
    small = spread is None or spread < 5e-3 * seconds  # what the last digit shown hides anyway
    return q.brief(seconds, None if small else spread)


def _duration(seconds: float | None) -> str:
    return "" if seconds is None else q.brief(seconds)


def _size(number: int | None) -> str:
    return "" if number is None else q.size(number)


def _part(amount: float | None, whole: float) -> str:
    return "" if amount is None or not whole else q.share(amount / whole)

"""What may be said of an ablation, in sentences with their numbers, and what may not.

Knows no layout.
"""

from __future__ import annotations

from ..ablation import Ablation, Row
from ..policy import comparison
from ..policy.comparison import Estimate
from . import quantities as q

SAME = 0.01  # of time or memory: what lies within it is called the same
POINTS = 0.5  # percentage points of accuracy that the hybrid may differ by


def sentences(ablation: Ablation) -> list[str]:
    """Return a sentence or two for each variant but the first, which it is compared with."""
    if not ablation.names:
        return []
    first, *others = ablation.variants
    scale = points_per_unit(ablation)
    said = [] if first.outcome == "finished" else [_unfinished(first)]
    for row in others:
        if row.outcome != "finished":
            said.append(_unfinished(row))
        elif row.time_reduction_ratio is not None:
            said.append(f"{row.name}: {', '.join(_costs(row, first.name))}")
            if row.accuracy_delta is not None:
                said.append(f"{row.name}: {_accuracy(row.accuracy_delta, scale, first.name)}")
    n = len(ablation.seeds)
    if n < comparison.FEW and len(said) > (first.outcome != "finished"):
        intervals = "intervals of so few are wide" if n >= comparison.FEWEST else "no interval"
        said.append(f"{_seeds(n)}: {intervals}; use {comparison.FEW} or more, e.g. --seeds 5")
    return said


def points_per_unit(ablation: Ablation) -> float:
    """Return what an accuracy is multiplied by to be in percent: 1 where it is given so."""
    known = [trial.accuracy for trial in ablation.trials if trial.accuracy is not None]
    return 1.0 if any(value > 1 for value in known) else 100.0


def _unfinished(row: Row) -> str:
    if row.outcome == "oom":
        return f"{row.name}: ran out of memory"
    return f"{row.name}: was not run"


def _costs(row: Row, base: str) -> list[str]:
    assert row.time_reduction_ratio is not None
    said = [_less(row.time_reduction_ratio, "training time", f"than {base}")]
    if row.memory_reduction_ratio is not None:
        said.append(_less(row.memory_reduction_ratio, "memory", ""))
    return said


def _less(ratio: Estimate, what: str, than: str) -> str:
    """Return how much less of something a variant took, or that this cannot be told."""
    than = f" {than}" if than else ""
    near = comparison.within(ratio, SAME)
    if near or (ratio.low is None and abs(ratio) < SAME):
        sure = f"within {q.share(SAME)}" if near else f"({_interval(ratio, 1.0, '%')})"
        return f"the same {what}{than.replace('than', 'as')} {sure}"
    if comparison.differs(ratio) is False:
        return f"no difference in {what} can be shown ({_interval(ratio, -100.0, '%')})"
    word, sign = ("less", 100.0) if ratio >= 0 else ("more", -100.0)
    return f"{q.share(abs(ratio))} {word} {what}{than} ({_interval(ratio, sign, '%')})"


def _accuracy(delta: Estimate, scale: float, base: str) -> str:
    points = scale * delta
    margin = POINTS / scale
    question = f"accuracy within {POINTS:g} points of {base}"
    found, near = _interval(delta, scale, "points"), comparison.within(delta, margin)
    if delta.n < comparison.FEWEST:
        return f"{question}: {_seeds(delta.n)} cannot tell ({points:+.2f} points)"
    if near is None:
        wanted = comparison.seeds_wanted(delta, margin) if delta.n >= comparison.FEW else None
        more = f"; about {wanted} seeds would tell" if wanted else ""
        return f"{question}: undecided, {found}{more}"
    if delta.low == delta.high == 0:
        return f"{question}: yes, the same with every one of {_seeds(delta.n)}"
    if not near and delta > 0:
        return f"{question}: better, {found}"
    return f"{question}: {'yes' if near else 'no'}, {found}"


def _interval(of: Estimate, factor: float, unit: str) -> str:
    if of.low is None or of.high is None:
        return f"{_seeds(of.n)}, no interval"
    low, high = sorted((factor * of.low, factor * of.high))
    sign, digits = "+" if low < 0 or unit != "%" else "", 1 if unit == "%" else 2
    ends = f"{low:{sign}.{digits}f}..{high:{sign}.{digits}f}"
    return f"95 % interval {ends} {unit}, {_seeds(of.n)}"


def _seeds(n: int) -> str:
    return f"{n} seed{'' if n == 1 else 's'}"

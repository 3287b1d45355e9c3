"""What a step's ledger says: memory by kind and stage, by module, and its arithmetic.

The ledger is gone through once, from its first moment to its last, with the bytes in use at hand.
Knows no training.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from ..findings import KINDS, Peak
from .ledger import Copied, Entry, Ledger, Read
from .lens import Look, Mark

_REST = KINDS[-1]


@dataclass(slots=True)
class Occupancy:
    """Of one step. `first_peaks` are the most in use in the forward and the backward pass of its
    first micro-batch, `kept_bytes` what was there before and is of no kind (copies of the engine);
    `activations` and `flops_of` are by module, with the modules in it; arithmetic and traffic are
    those of forward and backward passes. Where some arithmetic cannot be counted `flops` is empty,
    and `uncounted` holds its modules."""

    look: Look
    peaks: list[Peak] = field(default_factory=list)
    first_peaks: dict[str, int] = field(default_factory=dict)
    kept_bytes: int = 0
    activations: Counter[str] = field(default_factory=Counter)
    module_peaks: dict[str, int] = field(default_factory=dict)
    flops: Counter[str] = field(default_factory=Counter)
    flops_of: Counter[str] = field(default_factory=Counter)
    uncounted: set[str] = field(default_factory=set)
    convolution_flops: int = 0
    traffic_bytes: int = 0
    reads: list[Read] = field(default_factory=list)
    copies: list[Copied] = field(default_factory=list)
    attention: list[tuple[int, int, tuple[int, ...]]] = field(default_factory=list)


def of(look: Look) -> Occupancy:
    """Return what the ledger of a look says."""
    ledger = look.ledger
    assert ledger is not None
    made = Occupancy(look)
    _name_activations(ledger, look)
    _memory(made, ledger, look)
    for entry in ledger.entries:
        if entry.kind is None and entry.born == 0:
            made.kept_bytes += entry.size
        if entry.kind == "activations" and _within_first(look, entry.born):
            for path in above(entry.path):
                made.activations[path] += entry.size
    passes = [(start.moment, end.moment) for start, _, end in look.spans]

    def computing(moment: int) -> bool:
        return any(start < moment <= end for start, end in passes)

    for moment, path, precision, count, convolution in ledger.flops:
        if computing(moment):
            made.flops[precision] += count
            made.convolution_flops += count if convolution else 0
            for each in above(path):
                made.flops_of[each] += count
    unknown = [path for moment, path in ledger.uncounted if computing(moment)]
    if unknown:
        made.flops.clear()
        made.uncounted = {each for path in unknown for each in above(path)}
    made.traffic_bytes = sum(size for moment, size in ledger.traffic if computing(moment))
    made.reads = [read for read in ledger.reads if computing(read.at)]
    made.copies = [copied for copied in ledger.copies if computing(copied.at)]
    made.attention = [found for found in ledger.attention if _within_first(look, found[0])]
    return made


def above(path: str | None) -> Iterator[str]:
    """Yield a module's path and those of the modules that it is in, up to the model's."""
    while path:
        yield path
        path = path.rpartition(".")[0]
    if path is not None:
        yield ""


def _within_first(look: Look, moment: int) -> bool:
    start, _, end = look.spans[0]
    return start.moment < moment <= end.moment


def _name_activations(ledger: Ledger, look: Look) -> None:
    """What a forward pass makes and is there at its end was made for the backward pass."""
    for start, middle, _ in look.spans:
        for entry in ledger.entries:
            lives = entry.died is None or entry.died > middle.moment
            if entry.kind is None and start.moment < entry.born <= middle.moment and lives:
                entry.kind = "activations"


def _memory(made: Occupancy, ledger: Ledger, look: Look) -> None:
    """Find the most that is in use in each stage, in the first micro-batch, and by module."""
    stages = _stages(look)
    highest: dict[str, tuple[int, dict[str, int]]] = {}
    in_use: Counter[str] = Counter()
    path: str | None = None
    for moment, kind, size, turned in _changes(ledger.entries, look):
        if kind is None:
            path = turned
        else:
            in_use[kind] += size
        stage = next((name for name, start, end in stages if start < moment <= end), None)
        if stage is None:
            continue
        total = sum(in_use.values())
        if total > highest.get(stage, (-1, {}))[0]:
            highest[stage] = total, dict(in_use)
        if stage == "forward":
            for each in above(path):
                made.module_peaks[each] = max(made.module_peaks.get(each, 0), total)
        if _within_first(look, moment):  # a cut batch lies in one piece until it is all done with
            total += look.input_bytes - in_use["input"]
            made.first_peaks[stage] = max(made.first_peaks.get(stage, 0), total)
    told = _told(look, stages)
    for name in dict.fromkeys(name for name, _, _ in stages):
        total, kinds = highest.get(name, (0, {}))
        kinds = {kind: kinds[kind] for kind in KINDS if kinds.get(kind)}
        if name in told:  # the allocator's own word: what it has beyond that is the rest
            kinds[_REST] = kinds.get(_REST, 0) + max(0, told[name] - total)
            total = max(told[name], total)
        if total:
            made.peaks.append(Peak(name, total, kinds))
    made.first_peaks |= _told(look, stages[:2])


def _changes(entries: list[Entry], look: Look) -> list[tuple[int, str | None, int, str | None]]:
    """Return (moment, kind, bytes more, None) and, where the turn is another module's, (moment,
    None, 0, its path), in the order of moments."""
    found: list[tuple[int, str | None, int, str | None]] = []
    for entry in entries:
        kind = entry.kind or _REST
        found.append((entry.born, kind, entry.size, None))
        if entry.died is not None:
            found.append((entry.died, kind, -entry.size, None))
    found += [(mark.moment, None, 0, path) for path, mark in look.switches]
    return sorted(found, key=operator.itemgetter(0))


def _stages(look: Look) -> list[tuple[str, int, int]]:
    """Return (name, first moment, last moment) of the step's stages."""
    found = []
    for start, middle, end in look.spans:
        found.append(("forward", start.moment, middle.moment))
        found.append(("backward", middle.moment, end.moment))
    found += [("optimizer", start.moment, end.moment) for start, end in look.ends[-1:]]
    return found


def _marks(look: Look) -> list[Mark]:
    marks = [mark for span in (*look.spans, *look.ends) for mark in span]
    marks += [mark for _, mark in look.switches]
    return sorted({id(mark): mark for mark in marks}.values(), key=lambda mark: mark.moment)


def _told(look: Look, stages: list[tuple[str, int, int]]) -> dict[str, int]:
    """Return the allocator's own peaks by stage, where it was asked."""
    found: dict[str, int] = {}
    for name, first, last in stages:
        for mark in _marks(look):
            if first < mark.moment <= last and mark.peak_bytes is not None:
                found[name] = max(found.get(name, 0), mark.peak_bytes)
    return found

"""Run: what a training run did, bounded in memory, readable without torch.

Plain data and its JSON lines. How it looks (table, figure, HTML) is the `report` room's business,
which is imported only when asked for.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from . import records
from .errors import HybridMagicError
from .records import (
    BatchChangeRecord,
    NoteRecord,
    StartRecord,
    StepRecord,
    TelemetryRecord,
    ValidationRecord,
)
from .sizes import StepSizes
from .writing import written_whole

last_run: Run | None = None  # the newest Run of this process, also of one that did not finish

FORMAT = 1


class History(Sequence[StepRecord]):
    """The steps of a run, oldest first, thinned so that a million of them stay in bounded memory.

    At most `limit` (5 or more) records are held. When that is reached, of every stretch of steps
    the lowest and the highest loss stay, and one without a loss to compare (skipped, not a number),
    so that spikes survive; as the run goes on the stretches become longer, all of them alike.
    """

    def __init__(self, limit: int = 4096) -> None:
        self._limit = limit
        self._records: list[StepRecord] = []
        self._stretch = 8  # steps
        self.seen = 0  # records ever appended

    def append(self, record: StepRecord) -> None:
        self.seen += 1
        self._records.append(record)
        if len(self._records) > self._limit:
            self._thin()

    def _thin(self) -> None:
        first, *middle, last = self._records
        while True:
            stretches: dict[int, list[StepRecord]] = {}
            for record in middle:
                stretches.setdefault(record.step // self._stretch, []).append(record)
            middle = [record for group in stretches.values() for record in _extremes(group)]
            if len(middle) + 2 <= max(5, self._limit * 3 // 4):
                break
            self._stretch *= 2
        self._records = [first, *middle, last]

    def __getitem__(self, index: Any) -> Any:
        return self._records[index]

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[StepRecord]:
        return iter(self._records)


def _extremes(records: list[StepRecord]) -> list[StepRecord]:
    lost = [record for record in records if _lost(record)]
    rest = sorted((r for r in records if not _lost(r)), key=lambda r: r.loss or 0.0)
    stay = {record.step: record for record in (*lost[:1], *rest[:1], *rest[-1:])}
    return sorted(stay.values(), key=lambda record: record.step)


def _lost(record: StepRecord) -> bool:
    return record.skipped or record.loss is None or math.isnan(record.loss)


class Readings(Sequence[TelemetryRecord]):
    """The telemetry of a run, oldest first: at most `limit` (3 or more) records, evenly apart in
    the order in which they came, and the newest."""

    def __init__(self, limit: int = 512) -> None:
        self._limit, self._stride = limit, 1
        self._records: list[TelemetryRecord] = []
        self.seen = 0  # records ever appended

    def append(self, record: TelemetryRecord) -> None:
        if self.seen and (self.seen - 1) % self._stride:
            self._records.pop()  # it was kept for being the newest
        self._records.append(record)
        self.seen += 1
        if len(self._records) > self._limit:
            self._stride *= 2
            newest = [] if len(self._records) % 2 else [record]
            self._records = self._records[::2] + newest

    def __getitem__(self, index: Any) -> Any:
        return self._records[index]

    def __len__(self) -> int:
        return len(self._records)


@dataclass
class Run:
    """What a run did. Times in seconds, memory in bytes; `None` is unknown.

    `outcome` is "finished", "stopped", "interrupted" or "failed". `peak_allocated_bytes` is what
    tensors needed (on a CPU: the process's peak resident set), `peak_reserved_bytes` what the
    allocator took. `metrics` is a dict a validation. `seconds` counts training: not validation,
    which is `validation_seconds`, nor what is measured before the first step to choose precision
    and sizes, `opening_seconds`; what was shown meanwhile took `drawing_seconds` of them (None:
    nothing was shown). `retries` is how often a step ran out of memory and started over. `sizes`
    are the micro-batch sizes of every step, for `replay=`. `telemetry` is what the machine's gauges
    showed, about once a second.
    """

    config: dict[str, Any]
    environment: dict[str, Any]
    outcome: str = "failed"
    steps: int = 0
    samples_seen: int = 0
    seconds: float = 0.0
    validation_seconds: float = 0.0
    opening_seconds: float = 0.0
    peak_allocated_bytes: int | None = None
    peak_reserved_bytes: int | None = None
    final_loss: float | None = None
    skipped_steps: int = 0
    retries: int = 0
    drawing_seconds: float | None = None
    error: str | None = None
    start: StartRecord | None = None
    metrics: list[dict[str, float]] = field(default_factory=list)
    history: History = field(default_factory=History, repr=False)
    changes: list[BatchChangeRecord] = field(default_factory=list, repr=False)
    notes: list[str] = field(default_factory=list)
    sizes: StepSizes = field(default_factory=StepSizes, repr=False)
    telemetry: Readings = field(default_factory=Readings, repr=False)

    @property
    def samples_per_second(self) -> float | None:
        return self.samples_seen / self.seconds if self.seconds > 0 else None

    @property
    def energy_j(self) -> float | None:
        """Joules that the whole GPU drew from the first step to the end, whoever used it."""
        return self.telemetry[-1].energy_j if self.telemetry else None

    @property
    def energy_j_per_1000_samples(self) -> float | None:
        if self.energy_j is None or not self.samples_seen:
            return None
        return 1000 * self.energy_j / self.samples_seen

    def add(self, record: records.Record) -> None:
        """Take in one record; a Run is the first sink of every run."""
        match record:
            case StepRecord():
                self.history.append(record)
            case BatchChangeRecord():
                self.changes.append(record)
            case ValidationRecord():
                self.metrics.append(record.metrics)
            case NoteRecord():
                self.notes.append(record.text)
            case StartRecord():
                self.start = record
            case TelemetryRecord():
                self.telemetry.append(record)

    def summary(self) -> dict[str, Any]:
        """Return the run's totals as a plain dict."""
        return {
            "outcome": self.outcome,
            "steps": self.steps,
            "samples_seen": self.samples_seen,
            "seconds": self.seconds,
            "validation_seconds": self.validation_seconds,
            "opening_seconds": self.opening_seconds,
            "samples_per_second": self.samples_per_second,
            "peak_allocated_bytes": self.peak_allocated_bytes,
            "peak_reserved_bytes": self.peak_reserved_bytes,
            "final_loss": self.final_loss,
            "skipped_steps": self.skipped_steps,
            "retries": self.retries,
            "drawing_seconds": self.drawing_seconds,
            "energy_j": self.energy_j,
            "energy_j_per_1000_samples": self.energy_j_per_1000_samples,
            "error": self.error,
            "metrics": [dict(metrics) for metrics in self.metrics],
        }

    def table(self) -> str:
        """Return the run as a table of text."""
        from .report import tables

        return tables.text(self)

    def figure(self) -> Any:
        """Return the run's four plots as a matplotlib Figure (drawn off pyplot)."""
        from .report import plots

        return plots.figure(self)

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        from .report import page

        return page.mimebundle(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the run to `path` as JSON lines: totals first, then a line a record.

        The file is written under a temporary name and renamed, so that a half-written one is never
        found under `path`.
        """
        with written_whole(path) as file:
            for line in self.lines():
                file.write(line + "\n")

    def lines(self) -> Iterator[str]:
        """Yield the run as lines of JSON, for `from_lines`."""
        head = {
            "kind": "run",
            "format": FORMAT,
            "records": sum(1 for _ in self._records()),
            **self.summary(),
            "config": self.config,
            "environment": self.environment,
            "notes": self.notes,
            "sizes": self.sizes.entries(),
        }
        yield json.dumps(head)
        for record in self._records():
            yield json.dumps(records.as_json(record))

    def _records(self) -> Iterator[records.Record]:
        if self.start is not None:
            yield self.start
        yield from self.history
        yield from self.changes
        yield from self.telemetry


_TOTALS = [
    item.name
    for item in dataclasses.fields(Run)
    if item.name not in ("start", "history", "changes", "sizes", "telemetry")
]


def load_run(path: str | os.PathLike[str]) -> Run:
    """Return the Run that `Run.save` wrote to `path`; needs no torch.

    Raises:
        HybridMagicError: the file is not a saved run, is cut short, or is of another format.
    """
    try:
        with open(path, encoding="utf-8") as file:
            return from_lines(file)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise HybridMagicError(
            f"{path} is damaged, or not a run that this version saved; wanted a whole file written "
            "by run.save(); check its path, or save the run again"
        ) from None


def from_lines(text: Iterable[str]) -> Run:
    """Return the Run whose `lines` these are.

    Raises:
        AttributeError, KeyError, TypeError, ValueError: they are not.
    """
    head, *lines = (json.loads(line) for line in text if line.strip())
    if (head["kind"], head["format"], head["records"]) != ("run", FORMAT, len(lines)):
        raise ValueError("another file, or not all of it")
    run = Run(**{name: head[name] for name in _TOTALS if name in head})
    run.sizes = StepSizes.from_entries(head.get("sizes", ()))
    for line in lines:
        record = records.from_json(line)
        if record is not None:
            run.add(record)
    return run

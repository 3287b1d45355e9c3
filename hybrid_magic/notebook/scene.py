"""Scene: what is known of a run while it runs, in the words and numbers that a view shows.

Fed with records, bounded however long the run gets. Knows no widget and draws nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from ..records import (
    BatchChangeRecord,
    NoteRecord,
    Record,
    StartRecord,
    StepRecord,
    TelemetryRecord,
    ValidationRecord,
)
from ..report import quantities as q
from ..report.trace import Trace

_MARKED = 30  # decisions kept for their marks
_LOOKS = 24  # recent looks that speed and remaining time are taken from


class Scene:
    """The run so far. `now` is always the view's clock, in seconds."""

    def __init__(self, start: StartRecord, now: float) -> None:
        self.start = start
        self.began = now
        self.trace = Trace()
        self.last: StepRecord | None = None
        self.changes: deque[BatchChangeRecord] = deque(maxlen=_MARKED)
        self.validation: ValidationRecord | None = None
        self.notes: deque[str] = deque(maxlen=4)
        self.paused = self.stopping = False
        self._looked, self._idle_s = now, 0.0
        self._looks: deque[tuple[float, int, float]] = deque(maxlen=_LOOKS)

    def take(self, record: Record) -> None:
        """Take in one record that is not a step."""
        match record:
            case BatchChangeRecord():
                self.changes.append(record)
            case ValidationRecord():
                self.validation = record
            case NoteRecord():
                self.notes.append(record.text)
            case TelemetryRecord():
                self.trace.device_holds(record.gpu_used_bytes)

    def take_steps(self, records: Sequence[StepRecord]) -> None:
        if records:
            self.trace.extend(records)
            self.last = records[-1]

    def look(self, now: float) -> None:
        """Note where the run is, for speed and remaining time; call it before reading those."""
        if self.paused:
            self._idle_s += now - self._looked
            self._looks.clear()
        elif self.last is not None:
            self._looks.append((now, self.last.samples_seen, self.fraction(now) or 0.0))
        self._looked = now

    def elapsed_s(self, now: float) -> float:
        """Return the seconds since the start, pauses left out."""
        return now - self.began - self._idle_s

    def total_samples(self) -> int | None:
        if self.start.samples_per_epoch is None or self.start.epochs is None:
            return None
        return self.start.samples_per_epoch * self.start.epochs

    def fraction(self, now: float) -> float | None:
        """Return how much of the run is done, 0 to 1, None where no end is known."""
        total, seen = self.total_samples(), self.last.samples_seen if self.last else 0
        parts = []
        if total:
            parts.append(seen / total)
        if self.start.steps:
            parts.append((self.last.step if self.last else 0) / self.start.steps)
        if self.start.minutes:
            parts.append(self.elapsed_s(now) / (60 * self.start.minutes))
        return min(1.0, max(parts)) if parts else None

    def samples_per_second(self) -> float | None:
        if len(self._looks) < 2 or self._looks[-1][0] <= self._looks[0][0]:
            return None
        (before, less, _), (after, more, _) = self._looks[0], self._looks[-1]
        return (more - less) / (after - before)

    def remaining_s(self) -> float | None:
        """Return the seconds left at the present pace, None where not known."""
        if len(self._looks) < 2:
            return None
        (before, _, less), (after, _, more) = self._looks[0], self._looks[-1]
        return (1.0 - more) * (after - before) / (more - less) if more > less else None

    def state(self) -> str:
        """Return in a word or two what the run is doing."""
        if self.stopping:
            return "Stopping at the end of this step"
        if self.paused:
            return "Paused"
        return (
            "Training" if self.last is not None else "Getting ready: the first step is on its way"
        )

    def progress(self, now: float) -> list[str]:
        """Return where the run is: "epoch 2 of 3", "step 340", "1,300 samples/s", "12 s so far"."""
        parts = []
        per_epoch = self.start.samples_per_epoch
        if self.last is not None:
            if per_epoch:
                epoch = max(0, self.last.samples_seen - 1) // per_epoch + 1
                epochs = self.start.epochs
                parts.append(
                    f"epoch {min(epoch, epochs)} of {epochs}" if epochs else f"epoch {epoch}"
                )
            parts.append(f"step {q.count(self.last.step)}")
        speed = self.samples_per_second()
        if speed is not None:
            parts.append(q.rate(speed))
        parts.append(f"{q.calm(self.elapsed_s(now))} so far")
        left = None if self.paused else self.remaining_s()
        if left is not None:
            parts.append(f"about {q.calm(max(1.0, left))} to go")
        return parts

    def why(self) -> str | None:
        """Return why the last decision was taken, None before the first."""
        if not self.changes:
            return None
        made = self.changes[-1]
        return f"step {q.count(made.step)}: {made.reason}"

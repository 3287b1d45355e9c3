"""What stands under `%%hybrid_ablate`: progress over all its runs, and a table that fills.

A sink of the engine and the owner of its RunControl. Where a kernel runs it is one output, replaced
in place, with a Stop button where the front end answers; else a line of text a run. A view that
fails says so and never ends the training.
"""

from __future__ import annotations

import sys
import time
import uuid
from collections.abc import Callable
from html import escape
from typing import Any

from ..ablation import Ablation
from ..engine.control import RunControl
from ..records import Record, StartRecord, StepRecord, TrialRecord, TrialStartRecord
from ..report import comparisons
from ..report import quantities as q
from ..report.cards import progress_bar
from .live import running_kernel
from .pump import Pump, interrupts_held
from .scene import Scene

EVERY_S = 1.0  # between two redraws


def open_view(shell: Any, *, plain: bool) -> AblationView:
    """Return the view of an ablation that is about to start; `plain` asks for text only."""
    return AblationView(shell, None if plain else running_kernel())


class AblationView:
    """Called with each Record; `control` is for the engine, `after` shows what comes below."""

    after: Callable[[], object] = staticmethod(lambda: None)

    def __init__(self, shell: Any, kernel: Any | None) -> None:
        self.control = RunControl(poll=self._poll)
        # Bound now: while a cell's loop runs, what is printed and shown is held back.
        self._publish, self._out = shell.display_pub.publish, sys.stdout
        self._kernel, self._id = kernel, f"hybrid-{uuid.uuid4().hex}"
        self._pump: Pump | None = None
        self._button: Any = None
        self._trials: list[TrialRecord] = []
        self._names: dict[str, None] = {}
        self._now: TrialStartRecord | None = None
        self._scene: Scene | None = None  # of the run in hand
        self._began: float | None = None
        self._table, self._due, self._closed = "", 0.0, False

    def __call__(self, record: Record) -> None:
        if isinstance(record, StepRecord):
            if self._scene is not None:
                self._scene.last = record
            return
        if isinstance(record, StartRecord):
            self._scene = Scene(record, time.monotonic())
        elif isinstance(record, TrialStartRecord):
            self._begin(record)
        elif isinstance(record, TrialRecord):
            self._end(record)

    def _begin(self, record: TrialStartRecord) -> None:
        opened, self._now, self._scene = self._now is not None, record, None
        self._names[record.variant] = None
        if record.number is not None and self._began is None:
            self._began = time.monotonic()
        self._guarded(self._draw if opened else self._open)

    def _end(self, record: TrialRecord) -> None:
        self._trials.append(record)
        self._scene = None
        if self._kernel is None:
            self._guarded(self._write)
            return
        so_far = Ablation(trials=list(self._trials), names=tuple(self._names))
        self._table = comparisons.table_html(so_far)

    def _fraction(self) -> float:
        share = self._scene.fraction(time.monotonic()) if self._scene is not None else None
        return (len(self._trials) + (share or 0.0)) / self._now.total if self._now else 0.0

    def _remaining_s(self) -> float | None:
        done = self._fraction()
        if self._began is None or done <= 0:
            return None
        return (time.monotonic() - self._began) * (1 - done) / done

    def _where(self) -> str:
        now = self._now
        assert now is not None
        left = self._remaining_s()
        to_go = f", about {q.calm(max(1.0, left))} to go" if left is not None else ""
        if now.number is None:
            return f"Warming up {now.variant}: a few steps outside the clock"
        return f"Run {now.number} of {now.total}: {now.variant}, seed {now.seed}{to_go}"

    # -- in a notebook --

    def _open(self) -> None:
        if self._kernel is None:
            return
        import ipywidgets as W

        self._pump = Pump(self._kernel)
        if self._pump.why is None:
            tip = "End here; what is done is kept"
            self._button = W.Button(description="Stop", icon="stop", tooltip=tip)
            self._button.on_click(self._stop)
            view = {"version_major": 2, "version_minor": 0, "model_id": self._button.model_id}
            bundle = {"application/vnd.jupyter.widget-view+json": view, "text/plain": ""}
            self._publish(bundle, transient={"display_id": f"{self._id}-stop"})
        self._publish(self._bundle(), transient={"display_id": self._id})
        self._due = time.monotonic() + EVERY_S

    def _stop(self, button: Any) -> None:
        button.disabled, button.description = True, "Stopping"
        self.control.ask("stop")

    def _draw(self) -> None:
        if self._kernel is None:
            return
        with interrupts_held():
            self._publish(self._bundle(), transient={"display_id": self._id}, update=True)
        self._due = time.monotonic() + EVERY_S

    def _bundle(self) -> dict[str, str]:
        where = self._where()
        bar = progress_bar(100 * self._fraction(), "Progress", "max-width:860px;")
        return {
            "text/plain": where,
            "text/html": f"<div>{escape(q.unbroken(where))}</div>{bar}{self._table}",
        }

    def _poll(self) -> None:
        now = time.monotonic()
        if self._pump is not None and now >= self._pump.due:
            self._pump()
        if now >= self._due and self._now is not None:
            self._guarded(self._draw)

    # -- as text --

    def _write(self) -> None:
        trial, now = self._trials[-1], self._now
        assert now is not None
        if trial.outcome == "oom":
            said = "out of memory"
        else:
            parts = [q.seconds(trial.seconds or 0.0), q.size(trial.peak_allocated_bytes)]
            if trial.accuracy is not None:
                parts.append(f"accuracy {q.value(trial.accuracy)}")
            said = ", ".join(parts)
        left = self._remaining_s() if len(self._trials) < now.total else None
        to_go = f"; about {q.calm(max(1.0, left))} to go" if left is not None else ""
        self._out.write(
            f"{now.number} of {now.total}  {trial.variant}, seed {trial.seed}: {said}{to_go}\n"
        )
        self._out.flush()

    # -- the end --

    def _guarded(self, work: Any) -> None:
        try:
            work()
        except Exception as error:  # noqa: BLE001 - a picture of the training must never end it
            self._kernel, self._due = None, float("inf")
            sys.stderr.write(
                f"hybrid_magic: the live view stopped ({type(error).__name__}: {error}); the "
                "ablation goes on, as text\n"
            )

    def close(self, made: Ablation | None) -> None:
        """Show the ablation in the progress's place (nothing, when None) and end the view."""
        if self._closed:
            return
        self._closed, self.control.poll = True, None
        if self._button is not None:
            self._button.close()
            stop = {"display_id": f"{self._id}-stop"}
            self._publish({"text/plain": "", "text/html": ""}, transient=stop, update=True)
        shown = self._now is not None and self._pump is not None
        if made is None:
            if shown:
                empty = {"text/plain": "", "text/html": ""}
                self._publish(empty, transient={"display_id": self._id}, update=True)
        elif self._kernel is None:
            self._out.write(comparisons.text(made) + "\n")
        else:
            table = {"text/plain": comparisons.text(made), "text/html": comparisons.html(made)}
            self._publish(table, transient={"display_id": self._id}, update=shown)
            data, metadata = comparisons.figure_bundle(made)
            self._publish(data, metadata)
        self.after()

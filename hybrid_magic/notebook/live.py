"""What stands under the cell while it trains, and what stays when it is done.

A View is the engine's sink and owns the RunControl. It shows a panel where a front end answers, a
line of text where none does, and finds out by itself which. Drawing takes at most a hundredth of
the run, by its own clock; a view that fails says so once and never ends the training.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from ..engine.control import RunControl
from ..records import Record, StartRecord, StepRecord
from ..report import page, tables
from ..run import Run
from .pump import Pump, interrupts_held
from .scene import Scene
from .textline import TextLine

DRAW_SHARE = 0.0012  # of the run, a redraw a second: to show one costs a page far more than us
SOONEST_S, LATEST_S = 0.25, 5.0  # between two redraws; one slow redraw must not freeze the view
ANSWER_WITHIN_S = 2.0  # a front end that shows the panel says so; else text is written
SILENT = (
    "The front end has sent nothing since the run began, so these controls may not act before it "
    "ends; the kernel's interrupt ends it at a whole step."
)
_MOST_PENDING = 4096  # steps kept for the next redraw


def open_view(*, plain: bool) -> View:
    """Return the view of a run that is about to start; `plain` asks for text only."""
    return View(kernel=running_kernel(), plain=plain)


class View:
    """Called with each Record; `control` is for the engine, `cost_s` is what drawing has cost.

    `close` puts the result in the panel's place and leaves nothing alive.
    """

    def __init__(self, *, kernel: Any | None, plain: bool) -> None:
        self.control = RunControl(poll=self._poll)
        self.cost_s = 0.0
        self._kernel, self._plain = kernel, plain
        self._pending: list[StepRecord] = []
        self._scene: Scene | None = None
        self._pump: Pump | None = None
        self._panel: Any = None
        self._text: TextLine | None = None
        self._handle: Any = None
        self._due = self._pump_due = float("inf")
        self._drawn = self._usual_cost_s = 0.0
        self._patience_ends = 0.0
        self._closed = False

    def __call__(self, record: Record) -> None:
        if type(record) is StepRecord:
            self._pending.append(record)
        elif isinstance(record, StartRecord):
            self._open(record)
        elif self._scene is not None:
            self._scene.take(record)

    def _open(self, start: StartRecord) -> None:
        now, began = time.monotonic(), time.perf_counter()
        self._scene = Scene(start, now)
        if self._kernel is not None and not self._plain:
            try:
                self._open_panel(self._scene, now)
            except Exception as error:  # noqa: BLE001 - see _failed
                self._failed(error)
        else:
            self._open_text()
        self._due = now
        self.cost_s += time.perf_counter() - began

    def _open_panel(self, scene: Scene, now: float) -> None:
        from IPython.display import display

        from .panel import Panel

        self._pump = Pump(self._kernel)
        self._panel = Panel(self.control, scene, self._pump.why)
        with interrupts_held():
            self._panel.draw(now)
            self._handle = display(self._panel.mimebundle(), raw=True, display_id=True)
        self._pump_due = self._pump.due
        self._patience_ends = now + ANSWER_WITHIN_S

    def _open_text(self) -> None:
        if self._text is None and self._scene is not None:
            elapsed_s = time.monotonic() - self._scene.began
            terminal = self._kernel is None
            self._text = TextLine(self._scene, terminal=terminal, elapsed_s=elapsed_s)

    def _poll(self) -> None:
        now = time.monotonic()
        if now < self._pump_due and now < self._due and len(self._pending) < _MOST_PENDING:
            return
        began = time.perf_counter()
        try:
            if self._scene is not None and (
                now >= self._due or len(self._pending) >= _MOST_PENDING
            ):
                self._look(self._scene, now)
            if self._pump is not None and now >= self._pump_due:
                self._pump()
                self._pump_due = self._pump.due
                if self._pump.why and self._panel is not None:
                    self._panel.deafen(self._pump.why)
                if self.control.mail:  # whoever asks is looking: show soon what came of it
                    self._due = min(self._due, self._drawn + SOONEST_S)
        except Exception as error:  # noqa: BLE001 - see _failed
            self._failed(error)
        finally:
            self.cost_s += time.perf_counter() - began

    def _look(self, scene: Scene, now: float) -> None:
        """Take in what has happened, and draw it when the time has come."""
        began = time.perf_counter()
        pending, self._pending = self._pending, []
        scene.take_steps(pending)
        if now < self._due:
            return
        scene.look(now)
        self._choose(now)
        least_s = SOONEST_S
        with interrupts_held():
            if self._text is not None:
                self._text.draw()
                least_s = self._text.interval_s(scene.elapsed_s(now))
            elif self._panel is not None:
                self._panel.draw(now)
        cost_s = time.perf_counter() - began
        self._usual_cost_s = (
            0.7 * self._usual_cost_s + 0.3 * cost_s if self._usual_cost_s else cost_s
        )
        self._drawn = now
        self._due = now + max(least_s, min(LATEST_S, self._usual_cost_s / DRAW_SHARE))
        if now < self._patience_ends:  # whether to go on as text is seen to in time
            self._due = min(self._due, self._patience_ends)

    def _choose(self, now: float) -> None:
        """Panel or text: text while no front end has said that it shows the panel."""
        if self._panel is None:
            self._open_text()
        elif self._panel.views:
            if self._text is not None:
                self._text.close(leave=False)
                self._text = None
                self._panel.say("")
        elif now >= self._patience_ends and self._text is None:
            self._open_text()
            if self._pump is None or self._pump.why is None:
                self._panel.say(SILENT)

    def _failed(self, error: Exception) -> None:
        """Go on as text, or unseen: a picture of the training must never end the training."""
        panel, self._panel = self._panel, None
        shown, self._text = self._text, None
        self._pump_due = self._due = float("inf")
        how = "unseen" if shown is not None else "as text"
        self._say(
            f"the live view stopped ({type(error).__name__}: {error}); training goes on, {how}"
        )
        try:
            if panel is not None:
                panel.close()
            if shown is None:
                self._open_text()
                self._due = time.monotonic() + SOONEST_S
        except Exception:  # noqa: BLE001 - text failed too: go on unseen
            self._text = None

    @staticmethod
    def _say(words: str) -> None:
        sys.stderr.write(f"hybrid_magic: {words}\n")

    def close(self, run: Run | None) -> None:
        """Show the result of `run` in the panel's place (nothing, when None) and end the view."""
        if self._closed:
            return
        self._closed = True
        self._due = self._pump_due = float("inf")
        self.control.poll = None
        try:
            if self._scene is not None:
                self._scene.take_steps(self._pending)
            self._pending = []
            self._close_text()
            if run is not None:
                run.drawing_seconds = self.cost_s
                self._show(run)
            elif self._handle is not None:
                self._handle.update({"text/plain": ""}, raw=True)
        except Exception as error:  # noqa: BLE001 - the run is done and safe, whatever its picture does
            self._say(f"the result could not be shown ({type(error).__name__}: {error})")
        finally:
            if self._panel is not None:
                self._panel.close()
            self._panel = self._pump = self._scene = None

    def _close_text(self) -> None:
        if self._text is not None:
            self._text.draw()
            self._text.close(leave=True)
            self._text = None

    def _show(self, run: Run) -> None:
        if self._kernel is None or self._plain:
            sys.stdout.write(tables.text(run) + "\n")
            return
        from IPython.display import display

        if self._handle is not None:
            self._handle.update(page.table_bundle(run), raw=True)
        else:
            display(page.table_bundle(run), raw=True)
        if len(run.history):
            data, metadata = page.figure_bundle(run)
            display(data, metadata=metadata, raw=True)


def running_kernel() -> Any | None:
    """Return the kernel that this code runs in, None in a terminal or a plain Python."""
    if "IPython" not in sys.modules:
        return None
    from IPython.core.getipython import get_ipython

    return getattr(get_ipython(), "kernel", None)

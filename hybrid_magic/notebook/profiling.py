"""`%%hybrid_profile`: the cell of `%%hybrid_train`, a few steps of it looked at, and put back.

A step, or none, goes through the engine's `profile`; a loop is a whole cell that is ended when
enough was seen. A line of progress, then the result in its place. Decides nothing.
"""

from __future__ import annotations

import sys
import time
import uuid
from typing import Any

from ..config import ProfileConfig
from ..engine.control import RunControl
from ..engine.device import probe_for
from ..engine.profile import examine, profile
from ..profiles import Profile
from ..records import Record, StepRecord
from ..report import profiles as pages
from . import arguments, capture
from .ablating import device_here, loop_of
from .adopted import Loops
from .cell import Cell
from .live import running_kernel
from .pump import interrupts_held

EVERY_S = 0.5  # between two redraws
_OURS = ("steps", "trace", "snapshot", "log", "o", "plain")  # not what a loop is refused for


def profile_of(
    shell: Any, read: arguments.Line, config: ProfileConfig, cell: Cell, loops: Loops, view: Any
) -> Profile:
    """Return the profile of a cell, whose progress `view` shows."""
    __tracebackhide__ = True
    subject = loop_of(shell, read, cell, loops, config.log, _OURS)
    if subject is not None:
        return examine(subject, config, probe_for(device_here()), view, view.control)
    step, taken = capture.step_and_capture(shell, read, cell, config.log or ())
    return taken.hand_to(profile, step, read, view)


class ProfileView:
    """Called with each Record; `control` is for the engine."""

    def __init__(self, shell: Any, *, plain: bool) -> None:
        self.control = RunControl()
        # Bound now: while a cell's loop runs, what is printed and shown is held back.
        self._publish, self._out = shell.display_pub.publish, sys.stdout
        self._shown = not plain and running_kernel() is not None
        self._id, self._steps = {"display_id": f"hybrid-{uuid.uuid4().hex}"}, 0
        self._drawn = 0.0
        if self._shown:
            self._draw("Profiling: getting ready", update=False)

    def __call__(self, record: Record) -> None:
        if isinstance(record, StepRecord):
            self._steps += 1
            now = time.monotonic()
            if self._shown and now - self._drawn > EVERY_S:
                self._draw(f"Profiling: step {self._steps}", update=True)

    def _draw(self, words: str, *, update: bool) -> None:
        self._drawn = time.monotonic()
        with interrupts_held():
            self._publish({"text/plain": words}, transient=self._id, update=update)

    def close(self, made: Profile | None) -> None:
        """Show the profile in the progress's place (nothing, when None)."""
        if not self._shown:
            if made is not None:
                self._out.write(pages.text(made) + "\n")
            return
        if made is None:
            self._draw("", update=True)
            return
        table = {"text/plain": pages.text(made), "text/html": pages.html(made)}
        self._publish(table, transient=self._id, update=True)
        data, metadata = pages.figure_bundle(made)
        self._publish(data, metadata)

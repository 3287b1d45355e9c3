"""TextLine: a run's progress as a line of tqdm text, where no front end shows widgets.

In a terminal it is redrawn in place. In a saved notebook each redraw stays in the file, so they
come ever more seldom: some hundreds in the longest run.
"""

from __future__ import annotations

import sys
from typing import Any

from ..report import quantities as q
from .scene import Scene


class TextLine:
    """The line of one run; `terminal` is False where redraws are kept in a file."""

    def __init__(self, scene: Scene, *, terminal: bool, elapsed_s: float) -> None:
        from tqdm import tqdm

        class Bar(tqdm):
            monitor_interval = 0  # no thread of tqdm's own is left behind

        self._scene, self._terminal = scene, terminal
        start, total = scene.start, scene.total_samples()
        by_samples = total is not None and start.steps is None
        self._count = "samples_seen" if by_samples else "step"
        self._bar: Any = Bar(
            total=total if by_samples else start.steps,
            unit=" samples" if by_samples else " steps",
            file=sys.stderr if terminal else sys.stdout,
            desc="hybrid train",
            dynamic_ncols=terminal,
            mininterval=0,
            delay=1e-9,  # nothing is written before the first draw
        )
        self._bar.start_t -= elapsed_s

    def interval_s(self, elapsed_s: float) -> float:
        """Return how long to wait for the next redraw."""
        return 0.25 if self._terminal else max(1.0, elapsed_s / 50)

    def draw(self) -> None:
        """Show the scene as it is."""
        last = self._scene.last
        if last is None:
            return
        done, total = getattr(last, self._count), self._bar.total
        self._bar.n = done if total is None else min(done, total)
        micro, pieces = last.microbatch_size, last.accumulation_steps
        batch = q.batch(last.global_batch_size, micro, pieces, self._scene.start.processes)
        self._bar.set_postfix_str(f"loss {q.value(last.loss)}, batch {batch}", refresh=False)
        self._bar.refresh()

    def close(self, *, leave: bool) -> None:
        """End the line; it stays as the last state when `leave`, else it is wiped."""
        self._bar.leave = leave
        self._bar.close()

"""The host's gauges: memory of this process and its children, free memory, processor time.

Memory is read through psutil, imported when a Host is made; where it is missing or may not look, a
reading is `None`. Knows no torch.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .asking import answer

LIST_CHILDREN_EVERY = 30  # readings: finding children looks at every process of the machine


@dataclass(frozen=True, slots=True)
class HostReading:
    """What the host showed at one moment; `None` is unknown.

    `rss_bytes` is the resident memory of this process and its children (a loader's workers), pages
    that they share counted in each. `cpu_utilization_ratio` is this process's processor seconds per
    second since the reading before (of the first it is unknown): 1 is one core, busy all the time.
    """

    rss_bytes: int | None = None
    available_bytes: int | None = None
    cpu_utilization_ratio: float | None = None


class Host:
    """The machine as this process sees it."""

    def __init__(
        self,
        *,
        clock: Callable[[], float] = time.perf_counter,
        cpu_clock: Callable[[], float] = time.process_time,
    ) -> None:
        self._clock, self._cpu_clock = clock, cpu_clock
        self._before: tuple[float, float] | None = None
        self._psutil: Any = answer(lambda: importlib.import_module("psutil"))
        self._process: Any = answer(lambda: self._psutil.Process())
        self._children: list[Any] = []
        self._list_in = 0  # readings

    def read(self) -> HostReading:
        """Return what the gauges show now."""
        return HostReading(
            rss_bytes=self._rss_bytes(),
            available_bytes=answer(lambda: int(self._psutil.virtual_memory().available)),
            cpu_utilization_ratio=self._cpu_utilization(),
        )

    def _rss_bytes(self) -> int | None:
        own = answer(_resident, self._process)
        if own is None:
            return None
        if self._list_in == 0:
            self._children = answer(lambda: self._process.children(recursive=True)) or []
            self._list_in = LIST_CHILDREN_EVERY
        theirs = [answer(_resident, child) for child in self._children]
        self._list_in = 0 if None in theirs else self._list_in - 1  # an epoch's workers are gone
        return own + sum(size or 0 for size in theirs)

    def _cpu_utilization(self) -> float | None:
        before, self._before = self._before, (self._clock(), self._cpu_clock())
        if before is None or self._before[0] <= before[0]:
            return None
        return (self._before[1] - before[1]) / (self._before[0] - before[0])


def _resident(process: Any) -> int:
    return int(process.memory_info().rss)

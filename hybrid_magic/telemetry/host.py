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


def activity(pid: int) -> tuple[float, int, int] | None:
    """Return what a process and its children have done since they began: the processor seconds
    used, the bytes read and written, and how often they went on after a wait (on Linux: their main
    threads; a download that is slow does so at each packet). None where they cannot be looked at.
    """
    psutil: Any = answer(lambda: importlib.import_module("psutil"))

    def look() -> tuple[float, int, int]:
        process = psutil.Process(pid)
        each = [_done(each) for each in (process, *process.children(recursive=True))]
        seconds, moved, waits = zip(*each, strict=True)
        return sum(seconds), sum(moved), sum(waits)

    return answer(look)


def _done(process: Any) -> tuple[float, int, int]:
    used, counted = process.cpu_times(), answer(lambda: process.io_counters())
    kinds = ("read_chars", "write_chars", "read_bytes", "write_bytes")  # the first two: Linux
    moved = sum(getattr(counted, kind, 0) for kind in kinds)
    return used.user + used.system, moved, int(process.num_ctx_switches().voluntary)

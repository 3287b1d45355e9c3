"""Telemetry of a run: a thread that reads the gauges about once a second, whatever the loop does.

The thread touches nothing of the run: readings wait in a deque until the loop drains them on its
own thread. It ends with the run in bounded time, also where a driver hangs. Knows no torch.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Protocol

from ..records import TelemetryRecord
from .energy import Energy
from .host import Host, HostReading
from .nvml import Gpu, GpuReading, open_gpu

SOONEST_S, LATEST_S = 1.0, 60.0  # between two readings
SHARE = 0.002  # of the run, at most, in processor time of the thread
FIRST_S = 0.05  # a run that is over sooner has nothing opened for it
END_WITHIN_S = 1.0  # a reading takes milliseconds; one that hangs is not waited for
MOST_WAITING = 512  # readings that nobody has drained yet


class Gauge(Protocol):
    """What shows a HostReading, now; a Gpu is one of GpuReadings."""

    def read(self) -> HostReading: ...


class Reading(NamedTuple):
    """All gauges at one moment of the run."""

    at_s: float
    energy_j: float | None
    gpu: GpuReading
    host: HostReading


class Telemetry:
    """The gauges of one run. `readings` is what is not drained yet: empty, there is nothing to do.

    `start` and `end` are the loop's to call, once each; after `end` no thread is left, unless one
    hangs in a driver: it ends by itself when that lets it go, and nobody hears of it.
    """

    def __init__(
        self,
        find_gpu: Callable[[], Gpu | None],
        host: Gauge,
        *,
        clock: Callable[[], float] = time.perf_counter,
        cost_clock: Callable[[], float] = time.thread_time,
        first_s: float = FIRST_S,
    ) -> None:
        self.readings: deque[Reading] = deque(maxlen=MOST_WAITING)
        self.interval_s = SOONEST_S
        self._find_gpu, self._host = find_gpu, host
        self._clock, self._cost_clock, self._first_s = clock, cost_clock, first_s
        self._began = clock()
        self._energy = Energy()
        self._cost_s: float | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="telemetry", daemon=True)

    def start(self) -> None:
        """Begin to read."""
        self._began = self._clock()
        self._thread.start()

    def drain(self, step: int) -> list[TelemetryRecord]:
        """Return what was read since the last call; `step` is the newest that the loop has done."""
        found = []
        while self.readings:
            found.append(_record(step, self.readings.popleft()))
        return found

    def end(self) -> None:
        """Read a last time and end the thread; where it does not answer, the last is unknown."""
        self._ended.set()
        self._thread.join(END_WITHIN_S)
        if self._thread.is_alive():
            at_s = self._clock() - self._began
            self.readings.append(Reading(at_s, None, GpuReading(), HostReading()))

    def _watch(self) -> None:
        if self._ended.wait(self._first_s):
            return
        gpu = self._find_gpu()
        try:
            last = False
            while not last:
                last = self._ended.is_set()
                self.read(gpu)
                self._ended.wait(self.interval_s)
        finally:
            if gpu is not None:
                gpu.close()

    def read(self, gpu: Gpu | None) -> None:
        """Read every gauge once, and set the interval by what that has cost."""
        began, at_s = self._cost_clock(), self._clock() - self._began
        shown = GpuReading() if gpu is None else gpu.read()
        energy_j = self._energy.after(at_s, shown)
        self.readings.append(Reading(at_s, energy_j, shown, self._host.read()))
        cost_s = self._cost_clock() - began
        self._cost_s = cost_s if self._cost_s is None else 0.7 * self._cost_s + 0.3 * cost_s
        self.interval_s = min(LATEST_S, max(SOONEST_S, self._cost_s / SHARE))


def telemetry_of(gpu: bool, uuid: str | None = None, pci_bus_id: str | None = None) -> Telemetry:
    """Return the telemetry of a run that is about to begin.

    psutil is imported here, outside the run's clock, and not while a loader's worker is forked.

    Args:
        gpu: whether it trains on a GPU that NVML may show; `uuid`, `pci_bus_id`: which.
    """
    find_gpu = partial(open_gpu, uuid, pci_bus_id) if gpu else lambda: None
    return Telemetry(find_gpu, Host())


def _record(step: int, reading: Reading) -> TelemetryRecord:
    gpu, host = reading.gpu, reading.host
    return TelemetryRecord(
        step=step,
        at_s=reading.at_s,
        energy_j=reading.energy_j,
        gpu_used_bytes=gpu.used_bytes,
        gpu_utilization_ratio=gpu.utilization_ratio,
        gpu_power_w=gpu.power_w,
        gpu_temperature_c=gpu.temperature_c,
        gpu_clock_mhz=gpu.clock_mhz,
        gpu_max_clock_mhz=gpu.max_clock_mhz,
        host_rss_bytes=host.rss_bytes,
        host_available_bytes=host.available_bytes,
        cpu_utilization_ratio=host.cpu_utilization_ratio,
    )

"""The thread that reads: cheap, bounded, gone when it is told to, whatever a driver does."""

from __future__ import annotations

import itertools
import os
import threading
from typing import Any

import pytest
from fake_nvml import FakeGpu, FakeNvml

from hybrid_magic.telemetry import sampling
from hybrid_magic.telemetry.host import HostReading
from hybrid_magic.telemetry.nvml import Gpu
from hybrid_magic.telemetry.sampling import LATEST_S, MOST_WAITING, SHARE, SOONEST_S, Telemetry

PATIENCE_S = 20.0  # of the test, where something is wrong


class FakeHost:
    """A gauge that says when it was read; it may wait to be let go."""

    def __init__(self, *, hangs: bool = False):
        self.was_read, self.let_go = threading.Event(), threading.Event()
        self.hangs = hangs

    def read(self) -> HostReading:
        self.was_read.set()
        if self.hangs:
            self.let_go.wait(PATIENCE_S)
        return HostReading(1, 2, 0.5)


def gpu_of(nvml: FakeNvml) -> Gpu:
    nvml.nvmlInit()
    return Gpu(nvml, nvml.gpus[0], instance=False)


def telemetry(host: Any = None, **options: Any) -> Telemetry:
    options = {"clock": itertools.count(100.0).__next__, "first_s": 0.0} | options
    return Telemetry(options.pop("find_gpu", lambda: None), host or FakeHost(), **options)


def test_a_reading_becomes_a_record_of_the_step_that_is_done_when_it_is_drained():
    nvml = FakeNvml(FakeGpu("GPU-a"))
    watched, gpu = telemetry(), gpu_of(nvml)
    watched.read(gpu)
    nvml.gpus[0].energy_mj += 150_000
    watched.read(None)
    watched.read(gpu)
    first, without, last = watched.drain(7)
    assert [first.at_s, without.at_s, last.at_s] == [1, 2, 3]  # the clock stood at 100 when made
    assert {first.step, without.step, last.step} == {7}
    assert (first.gpu_used_bytes, first.gpu_power_w, first.gpu_clock_mhz) == (5, 200, 1740)
    assert (first.gpu_max_clock_mhz, first.gpu_temperature_c) == (1980, 61)
    assert (first.host_rss_bytes, first.host_available_bytes) == (1, 2)
    assert (first.gpu_utilization_ratio, first.cpu_utilization_ratio) == (0.93, 0.5)
    assert [first.energy_j, without.energy_j, last.energy_j] == [200, None, 350]
    assert without.gpu_used_bytes is None
    assert watched.drain(8) == []


@pytest.mark.parametrize(
    ("cost_s", "interval_s"),
    [(1e-5, SOONEST_S), (0.01, 0.01 / SHARE), (5.0, LATEST_S)],
)
def test_the_interval_grows_with_what_a_reading_costs(cost_s, interval_s):
    watched = telemetry(cost_clock=itertools.count(0.0, cost_s).__next__)
    for _ in range(50):
        watched.read(None)
    assert watched.interval_s == pytest.approx(interval_s)


def test_one_costly_reading_is_forgiven():
    costs = iter([0, 0.01, *itertools.chain.from_iterable((n, n + 1e-4) for n in range(1, 9))])
    watched = telemetry(cost_clock=lambda: next(costs))
    found = []
    for _ in range(9):
        watched.read(None)
        found.append(watched.interval_s)
    assert found[0] == pytest.approx(0.01 / SHARE)
    assert found[-1] == SOONEST_S


def test_readings_that_nobody_drains_are_bounded_and_the_newest_stay():
    watched = telemetry()
    for _ in range(2 * MOST_WAITING):
        watched.read(None)
    kept = watched.drain(1)
    assert len(kept) == MOST_WAITING
    assert kept[-1].at_s == 2 * MOST_WAITING


def test_the_thread_reads_a_last_time_and_is_gone_with_what_it_opened():
    nvml, host, before = FakeNvml(FakeGpu("GPU-a")), FakeHost(), threading.active_count()
    watched = telemetry(host, find_gpu=lambda: gpu_of(nvml))
    watched.start()
    assert host.was_read.wait(PATIENCE_S)
    assert nvml.open == 1
    watched.end()
    assert threading.active_count() == before
    assert nvml.open == 0
    first, *_, last = watched.drain(1)
    assert last.at_s > first.at_s
    assert last.gpu_used_bytes == 5


def test_a_run_that_is_over_at_once_opens_nothing():
    opened = []
    watched = telemetry(find_gpu=lambda: opened.append("a GPU"), first_s=PATIENCE_S)
    watched.start()
    watched.end()
    assert opened == []
    assert watched.drain(1) == []


@pytest.mark.parametrize("where", ["opening", "reading"])
def test_a_driver_that_hangs_is_not_waited_for_and_its_end_is_unknown(monkeypatch, where):
    monkeypatch.setattr(sampling, "END_WITHIN_S", 0.01)
    host, nvml = FakeHost(hangs=where == "reading"), FakeNvml(FakeGpu("GPU-a"))
    opening = threading.Event()

    def find_gpu():
        opening.set()
        if where == "opening":
            host.let_go.wait(PATIENCE_S)
        return gpu_of(nvml)

    watched = telemetry(host, find_gpu=find_gpu)
    watched.start()
    assert (opening if where == "opening" else host.was_read).wait(PATIENCE_S)
    watched.end()
    (last,) = watched.drain(3)
    assert (last.step, last.energy_j, last.gpu_used_bytes) == (3, None, None)
    host.let_go.set()  # the driver answers at last: the thread puts away what it opened, and ends
    watched._thread.join(PATIENCE_S)
    assert not watched._thread.is_alive()
    assert nvml.open == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_process_forked_meanwhile_has_no_such_thread_and_ends():
    host = FakeHost()
    watched = telemetry(host)
    watched.start()
    assert host.was_read.wait(PATIENCE_S)
    child = os.fork()
    if child == 0:
        os._exit(0 if threading.active_count() == 1 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    watched.end()
    assert not watched._thread.is_alive()


def test_without_a_gpu_nvml_is_not_asked(monkeypatch):
    monkeypatch.setattr(sampling, "open_gpu", lambda *identity: identity)
    assert sampling.telemetry_of(gpu=False)._find_gpu() is None
    found: Any = sampling.telemetry_of(gpu=True, uuid="u", pci_bus_id="p")._find_gpu()
    assert found == ("u", "p")

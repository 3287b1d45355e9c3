"""The host's gauges: this process and its children, or unknown."""

from __future__ import annotations

import sys
import types

import pytest

from hybrid_magic.telemetry.host import LIST_CHILDREN_EVERY, Host, HostReading


class Denied(Exception):
    pass


class FakeProcess:
    def __init__(self, rss: int | None, children: tuple[FakeProcess, ...] = ()):
        self.rss, self.kin, self.listed = rss, children, 0

    def memory_info(self):
        if self.rss is None:
            raise Denied
        return types.SimpleNamespace(rss=self.rss)

    def children(self, recursive):
        assert recursive
        self.listed += 1
        return list(self.kin)


@pytest.fixture
def on(monkeypatch):
    """Return a function that puts this process and this much free memory in psutil's place."""

    def put(process: FakeProcess, available: int | None = 900) -> Host:
        fake = types.ModuleType("psutil")
        fake.Process = lambda: process  # type: ignore[attr-defined]
        if available is not None:
            memory = types.SimpleNamespace(available=available)
            fake.virtual_memory = lambda: memory  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "psutil", fake)
        clock, cpu = iter([10.0, 12.0, 12.0]), iter([1.0, 4.0, 5.0])
        return Host(clock=lambda: next(clock), cpu_clock=lambda: next(cpu))

    return put


def test_memory_counts_the_children_and_processor_time_is_per_second(on):
    host = on(FakeProcess(100, (FakeProcess(20), FakeProcess(3))))
    assert host.read() == HostReading(123, 900, None)  # nothing to compare the first one with
    assert host.read() == HostReading(123, 900, 1.5)
    assert host.read().cpu_utilization_ratio is None  # no time has passed


def test_children_are_listed_seldom_and_at_once_when_one_has_gone(on):
    host = on(FakeProcess(100, (FakeProcess(20),)))
    process = host._process
    for _ in range(LIST_CHILDREN_EVERY):
        host._rss_bytes()
    assert process.listed == 1
    host._rss_bytes()
    assert process.listed == 2
    process.kin[0].rss = None
    assert host._rss_bytes() == 100
    process.kin = (FakeProcess(7),)
    assert host._rss_bytes() == 107


def test_what_may_not_be_looked_at_is_unknown(on):
    assert on(FakeProcess(None), available=None).read() == HostReading(None, None, None)


def test_without_psutil_memory_is_unknown(monkeypatch):
    monkeypatch.setitem(sys.modules, "psutil", None)
    host = Host()
    host.read()
    found = host.read()
    assert (found.rss_bytes, found.available_bytes) == (None, None)
    assert found.cpu_utilization_ratio is not None


def test_the_real_psutil_tells_this_process():
    host = Host()
    host.read()
    found = host.read()
    assert found.rss_bytes is not None
    assert found.rss_bytes > 1 << 20
    assert found.available_bytes is not None

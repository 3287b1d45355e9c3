"""Energy of a run: by the driver's counter, else by power over time."""

from __future__ import annotations

import pytest

from hybrid_magic.telemetry.energy import Energy
from hybrid_magic.telemetry.nvml import GpuReading


def joules(*readings: tuple[float, float | None, float | None]) -> list[float | None]:
    """Return the energy after each (seconds, watts, counter in joules)."""
    energy = Energy()
    return [energy.after(at, GpuReading(power_w=w, energy_j=count)) for at, w, count in readings]


def test_the_counters_difference_is_the_energy():
    assert joules((0.0, 100, 5000), (1.0, 300, 5150), (3.0, None, 5500)) == [0, 150, 500]


def test_without_a_counter_power_is_summed_over_time_by_trapezoids():
    assert joules((0.0, 100, None), (1.0, 300, None), (3.0, 100, None)) == [0, 200, 600]


def test_what_was_drawn_before_the_first_reading_is_counted():
    assert joules((0.5, 100, 5000), (1.0, 100, 5050)) == [50, 100]
    assert joules((0.5, 100, None), (1.0, 100, None)) == [50, 100]
    assert joules((0.5, None, 5000), (1.0, None, 5050)) == [0, 50]


def test_where_neither_is_readable_energy_is_unknown():
    assert joules((0.0, None, None), (1.0, None, None)) == [None, None]
    assert joules((0.0, 100, 5000), (1.0, None, None)) == [0, None]


def test_a_moment_without_power_is_bridged_when_it_is_readable_again():
    assert joules((0.0, 100, None), (1.0, None, None), (2.0, 300, None)) == [0, None, 400]


def test_a_counter_that_fails_or_begins_anew_is_gone_on_from_by_power():
    found = joules((0.0, 100, 5000), (1.0, 100, None), (2.0, 100, 7), (3.0, 100, 107))
    assert found == pytest.approx([0, 100, 200, 300])

"""Energy of a run out of a GPU's gauges: the driver's counter, else power over time. Pure."""

from __future__ import annotations

from .nvml import GpuReading


class Energy:
    """Joules since the run began; what was drawn before the first reading, which is a moment, is
    taken from the power that it shows."""

    def __init__(self) -> None:
        self._power: tuple[float, float | None] = (0.0, None)  # when it was last known, in W
        self._joules = 0.0  # power over time, by trapezoids
        self._counter: tuple[float, float] | None = None  # its newest value, its zero

    def after(self, at_s: float, gpu: GpuReading) -> float | None:
        """Return the joules up to `at_s` seconds into the run, None where it cannot be told."""
        power_w, count_j = gpu.power_w, gpu.energy_j
        if power_w is not None:
            since_s, before_w = self._power
            mean_w = power_w if before_w is None else (before_w + power_w) / 2
            self._joules += mean_w * (at_s - since_s)
            self._power = at_s, power_w
        if count_j is not None:
            if self._counter is None or count_j < self._counter[0]:  # the driver counts anew
                zero_j = count_j - self._joules
            else:
                zero_j = self._counter[1]
            self._counter = count_j, zero_j
            return count_j - zero_j
        return None if power_w is None else self._joules

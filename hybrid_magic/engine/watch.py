"""Watch: a run's telemetry, begun with its clock, told between its steps, ended with it.

Says which device is meant and hands on what was read; reads no gauge itself.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from typing import Any

import torch

from ..records import TelemetryRecord
from ..telemetry import sampling
from . import ranks
from .machine import identity
from .progress import TrainState

watching = True  # False: runs begin without telemetry, for what compares the two


class Watch:
    """`readings` are those that are not told yet; `tell` and `end` may find nothing to do."""

    def __init__(self, state: TrainState) -> None:
        self._state = state
        readings = state.run.telemetry
        self._before = readings[-1] if readings else None  # the last of a run that is gone on with
        self.readings: deque[Any] = deque()
        self._telemetry: sampling.Telemetry | None = None
        self._begun = False
        group = ranks.current()
        if watching and (group is None or group.first):
            device, named = state.probe.device, (None, None)
            if device.type == "cuda":
                named = identity(torch.cuda.get_device_properties(device))
            self._telemetry = sampling.telemetry_of(device.type == "cuda", *named)
            self.readings = self._telemetry.readings

    def begin(self) -> None:
        """Begin to read: the clock of the run starts here."""
        if self._telemetry is not None:
            self._begun = True
            self._telemetry.start()

    def tell(self) -> None:
        """Emit what was read."""
        if self._telemetry is not None:
            for record in self._telemetry.drain(self._state.step):
                self._state.emit(_after(self._before, record))

    def end(self) -> None:
        """End the thread and emit the last readings."""
        if self._telemetry is not None and self._begun:
            self._telemetry.end()  # once more where an interrupt cuts it short
            self._begun = False
            self.tell()


def _after(before: TelemetryRecord | None, record: TelemetryRecord) -> TelemetryRecord:
    """Return a reading counted on from `before`, in time and energy."""
    if before is None:
        return record
    energy_j = None
    if before.energy_j is not None and record.energy_j is not None:
        energy_j = before.energy_j + record.energy_j
    return dataclasses.replace(record, at_s=before.at_s + record.at_s, energy_j=energy_j)

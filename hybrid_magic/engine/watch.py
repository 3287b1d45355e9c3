"""Watch: a run's telemetry, begun with its clock, told between its steps, ended with it.

Says which device is meant and hands on what was read; reads no gauge itself.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import torch

from ..telemetry import sampling
from .machine import identity
from .progress import TrainState

watching = True  # False: runs begin without telemetry, for what compares the two


class Watch:
    """`readings` are those that are not told yet; `tell` and `end` may find nothing to do."""

    def __init__(self, state: TrainState) -> None:
        self._state = state
        self.readings: deque[Any] = deque()
        self._telemetry: sampling.Telemetry | None = None
        self._begun = False
        if watching:
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
                self._state.emit(record)

    def end(self) -> None:
        """End the thread and emit the last readings."""
        if self._telemetry is not None and self._begun:
            self._begun = False
            self._telemetry.end()
            self.tell()

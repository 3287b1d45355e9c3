"""A device that is not there: late readings, and memory that is a line over the micro-batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from hybrid_magic.engine.data import StepData
from hybrid_magic.engine.device import DeviceProbe
from hybrid_magic.engine.prefetch import Mover


class SimulatedProbe(DeviceProbe):
    """A CPU that reports as a GPU does: late, and peak = fixed + per_sample * largest batch."""

    late = True

    def __init__(self, model: nn.Module, *, fixed: int, per_sample: int, total: int) -> None:
        super().__init__(torch.device("cpu"))
        self._fixed, self._per_sample, self._total = fixed, per_sample, total
        self._largest = 0
        self.highest = 0  # ever reached
        self.read_early = 0
        self._writing: Any = None
        model.register_forward_pre_hook(self._note)

    def _note(self, _: Any, args: Any) -> None:
        self._largest = max(self._largest, len(args[0]))
        self.highest = max(self.highest, self._now())

    def _now(self) -> int:
        return self._fixed + self._per_sample * self._largest

    @property
    def total_bytes(self) -> int:
        return self._total

    def peak(self) -> tuple[int, int]:
        return self._now(), self._now()

    def peak_if_due(self) -> tuple[int, int]:
        return self.peak()

    def reset_peak(self) -> None:
        self._largest = 0

    def fetch(self, values: torch.Tensor) -> Callable[[], list[float]]:
        self._writing = values

        def read() -> list[float]:
            self.read_early += values is self._writing
            return values.tolist()

        return read


class RecordingMover(Mover):
    """A mover that notes when copies begin and when they are waited for."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.log: list[str] = []

    def send(self, batch: Any) -> Any:
        self.log.append(f"send {int(batch[1][0])}")
        return super().send(batch)

    def receive(self, moved: Any) -> Any:
        self.log.append(f"use {int(moved[1][0])}")
        return moved


def numbered(sizes: list[list[int]]) -> list[StepData]:
    """Steps whose micro-batches carry their number as target."""
    steps, number = [], 0
    for micros in sizes:
        batches = []
        for size in micros:
            batches.append((torch.randn(size, 12), torch.full((size,), number)))
            number += 1
        steps.append(StepData(batches, micros, False))
    return steps

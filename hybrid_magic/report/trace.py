"""Trace: the curves of a run while it runs, in a fixed number of points however long it gets.

Steps are averaged into buckets; when the buckets are full, neighbours are merged and each holds
twice as many steps. The highest loss of a bucket is kept beside its mean, so that spikes survive;
of batch sizes the largest, as an epoch's last batch and a measurement are smaller.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from ..records import StepRecord


@dataclass(slots=True)
class Bucket:
    """Neighbouring steps as one point; sums and counts, so that two buckets add up to one."""

    step: int
    steps: int = 0
    loss_sum: float = 0.0
    losses: int = 0
    loss_max: float = -math.inf
    global_batch_size: int = 0
    microbatch_size: int = 0
    allocated_bytes: int | None = None
    reserved_bytes: int | None = None
    device_used_bytes: int | None = None
    stage_sums_s: list[float] = field(default_factory=lambda: [0.0] * 4)
    timed: int = 0
    step_sum_s: float = 0.0

    def add(self, record: StepRecord) -> None:
        """Take in one step; written out, as it is paid for at every one."""
        self.step = record.step
        self.steps += 1
        loss = record.loss
        if loss is not None and math.isfinite(loss):
            self.loss_sum += loss
            self.losses += 1
            if loss > self.loss_max:
                self.loss_max = loss
        if record.global_batch_size > self.global_batch_size:
            self.global_batch_size = record.global_batch_size
        if record.microbatch_size > self.microbatch_size:
            self.microbatch_size = record.microbatch_size
        if record.allocated_peak_bytes is not None:
            self.allocated_bytes = _larger(self.allocated_bytes, record.allocated_peak_bytes)
        if record.reserved_peak_bytes is not None:
            self.reserved_bytes = _larger(self.reserved_bytes, record.reserved_peak_bytes)
        if record.step_s is not None:
            self.timed += 1
            self.step_sum_s += record.step_s
            sums = self.stage_sums_s
            sums[0] += record.data_s or 0.0
            sums[1] += record.forward_s or 0.0
            sums[2] += record.backward_s or 0.0
            sums[3] += record.optimizer_s or 0.0

    def merge(self, later: Bucket) -> None:
        """Take in the bucket that follows."""
        self.step = later.step
        self.steps += later.steps
        self.loss_sum += later.loss_sum
        self.losses += later.losses
        self.loss_max = max(self.loss_max, later.loss_max)
        self.global_batch_size = max(self.global_batch_size, later.global_batch_size)
        self.microbatch_size = max(self.microbatch_size, later.microbatch_size)
        self.allocated_bytes = _larger(self.allocated_bytes, later.allocated_bytes)
        self.reserved_bytes = _larger(self.reserved_bytes, later.reserved_bytes)
        self.device_used_bytes = _larger(self.device_used_bytes, later.device_used_bytes)
        self.stage_sums_s = [
            a + b for a, b in zip(self.stage_sums_s, later.stage_sums_s, strict=True)
        ]
        self.timed += later.timed
        self.step_sum_s += later.step_sum_s


class Trace:
    """At most `limit` (even) buckets of `stride` steps each, oldest first; the last may fill up."""

    def __init__(self, limit: int = 64) -> None:
        self._limit = limit
        self.stride = 1
        self.buckets: list[Bucket] = []
        self._device_used_bytes: int | None = None  # of readings that no bucket holds yet

    def extend(self, records: Iterable[StepRecord]) -> None:
        for record in records:
            if not self.buckets or self.buckets[-1].steps >= self.stride:
                if len(self.buckets) == self._limit:
                    self._halve()
                self.buckets.append(Bucket(record.step))
            self.buckets[-1].add(record)
        if self.buckets and self._device_used_bytes is not None:
            newest = self.buckets[-1]
            newest.device_used_bytes = _larger(newest.device_used_bytes, self._device_used_bytes)
            self._device_used_bytes = None

    def device_holds(self, used_bytes: int | None) -> None:
        """Note a reading of the whole device, for the newest steps that come with `extend`."""
        self._device_used_bytes = _larger(self._device_used_bytes, used_bytes)

    def _halve(self) -> None:
        for early, late in zip(self.buckets[::2], self.buckets[1::2], strict=True):
            early.merge(late)
        self.buckets = self.buckets[::2]
        self.stride *= 2


def _larger(one: int | None, other: int | None) -> int | None:
    if one is None or other is None:
        return other if one is None else one
    return max(one, other)

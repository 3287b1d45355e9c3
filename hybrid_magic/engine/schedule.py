"""A person's learning-rate scheduler, advanced by the samples seen.

Their own loop would have called `scheduler.step()` once per loader batch, or once per epoch. Which
of the two is read off the scheduler. A step of one and a half loader batches advances it by one and
a half batches' worth, so the curve over samples is the one they asked for. Knows no policy.
"""

from __future__ import annotations

import functools
from typing import Any

from torch.optim import lr_scheduler

from ..errors import HybridMagicError

_HORIZONS = ("total_steps", "T_max", "total_iters", "T_0", "step_size")


class ScheduleClock:
    """Calls `scheduler.step()` as often as the plain loop would have by the same sample.

    Args:
        scheduler: any scheduler of torch.optim, or an object with `step()`.
        base: samples in a loader batch.
        batches: loader batches in an epoch, None when unknown.
        epochs: epochs that the run was asked for, None when it ends by steps or time.
    """

    def __init__(self, scheduler: Any, base: int, batches: int | None, epochs: int | None) -> None:
        self.scheduler = scheduler
        self._base, self._batches = base, batches
        self.per, self.why = _clock(scheduler, batches, epochs)
        self._in_epoch = 0  # loader batches of this epoch that the scheduler was told of

    def check(self, epochs: int) -> None:
        """Raise HybridMagicError when a OneCycleLR would end before `epochs` epochs do."""
        scheduler = self.scheduler
        if not isinstance(scheduler, lr_scheduler.OneCycleLR) or self._batches is None:
            return
        left, needed = scheduler.total_steps - scheduler.last_epoch, epochs * self._batches
        if needed > left:
            raise HybridMagicError(
                f"the scheduler has {left} of its {scheduler.total_steps} steps left, and "
                f"{epochs} epochs of {self._batches} batches need {needed}; wanted as many; make "
                "it (and its optimizer) anew"
            )

    def advance(self, samples_in_epoch: int) -> None:
        """Catch up with `samples_in_epoch` samples of this epoch."""
        if self.per == "batch":
            self._catch_up(samples_in_epoch // self._base)

    def end_epoch(self, samples_in_epoch: int, loss: float | None) -> None:
        """End the epoch after `samples_in_epoch` samples; `loss` is what a plateau is judged by."""
        if self.per == "batch":
            self._catch_up(-(-samples_in_epoch // self._base))  # the last batch may be short
        elif isinstance(self.scheduler, lr_scheduler.ReduceLROnPlateau):
            if loss is not None:
                self.scheduler.step(loss)
        else:
            self.scheduler.step()
        self._in_epoch = 0

    def _catch_up(self, batches: int) -> None:
        for _ in range(batches - self._in_epoch):
            self.scheduler.step()
        self._in_epoch = max(self._in_epoch, batches)


def _clock(scheduler: Any, batches: int | None, epochs: int | None) -> tuple[str, str]:
    """Return "batch" or "epoch", and why."""
    name = type(scheduler).__name__
    if isinstance(scheduler, (lr_scheduler.OneCycleLR, lr_scheduler.CyclicLR)):
        return "batch", f"{name} counts batches"
    if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
        return "epoch", f"{name} judges epochs"
    if isinstance(scheduler, lr_scheduler.LambdaLR) and any(
        isinstance(part, functools.partial) for part in scheduler.lr_lambdas
    ):
        return "batch", f"{name} of a partial function, as Transformers makes them, counts batches"
    horizon = _horizon(scheduler)
    if horizon is None:
        return "epoch", f"{name} names no number of steps"
    # Only a curve that is too long for the epochs, and not for the batches, can mean batches.
    many = 2 * (epochs or 1)
    if batches is not None and many < horizon and batches <= horizon <= 1.1 * batches * many:
        return "batch", f"{name} spans {horizon} steps, an epoch has {batches} batches"
    return "epoch", f"{name} spans {horizon} steps"


def _horizon(scheduler: Any) -> int | None:
    """Return how many of its own steps the scheduler's curve spans, None when it has no end."""
    parts = getattr(scheduler, "_schedulers", None)
    if parts:  # SequentialLR, ChainedScheduler
        spans = [span for span in map(_horizon, parts) if span is not None]
        milestones = getattr(scheduler, "_milestones", [])
        return max([*spans, *milestones], default=None)
    milestones = getattr(scheduler, "milestones", None)
    if milestones:
        return int(max(milestones))
    for name in _HORIZONS:
        if isinstance(value := getattr(scheduler, name, None), (int, float)):
            return int(value)
    return None

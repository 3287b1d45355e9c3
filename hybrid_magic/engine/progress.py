"""TrainState: where a run stands. Turns what steps gave into records and facts for the policy,
and requests into changes of the run.

Device values are read a step late where the device works ahead of the host, so that reading never
makes it wait. Trains nothing itself.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

from .. import run as runs
from ..config import TrainConfig
from ..errors import HybridMagicError
from ..policy import steering
from ..records import NoteRecord, Record, Sink, StepRecord, ValidationRecord
from ..run import Run
from . import requests
from .control import RunControl
from .data import Feed, StepData
from .device import DeviceProbe, is_out_of_memory
from .evaluate import evaluate
from .prepare import Interrupts
from .reading import Reading, read
from .schedule import ScheduleClock
from .step import StepResult, StepState

LATE_STEPS = 8  # how far reading may lag behind a device that decides for itself whether to skip


class TrainState:
    """All that changes while a run goes on, beside model and optimizer."""

    step_state: StepState
    interrupts: Interrupts
    schedule: ScheduleClock | None = None

    def __init__(
        self,
        run: Run,
        sink: Sink | None,
        control: RunControl | None,
        config: TrainConfig,
        probe: DeviceProbe,
        settings: steering.Settings,
        feed: Feed,
    ) -> None:
        self.run, self.probe, self.feed = run, probe, feed
        self.step = self.samples = self.epoch = self.in_epoch = 0
        self._sink, self._control = sink, control
        self.settings = settings
        self._steering = steering.init(settings)
        # Where nothing is left to be decided, the policy need not hear of every step.
        self._pinned = (
            settings.batch != "adaptive"
            and (settings.micro or settings.accum) is not None
            and settings.warmup in ("auto", 0)
        )
        self._epochs = config.passes
        self._steps = config.steps
        self._seconds = None if config.minutes is None else 60 * config.minutes
        self._pending: deque[tuple[int, int, StepResult, float, float]] = deque()
        self.begun = False  # the person's own code was called
        self._begun = 0.0
        self._not_training = 0.0  # seconds of validation and of pauses
        self._noise_scale: float | None = None
        self._validated = 0
        self._sums: bool | None = None  # whether the loss is a sum over samples; known after a step

    # -- what the data asks --

    def plan(self, remaining: int | None) -> steering.StepPlan:
        """Plan the next step, with `remaining` samples left in the epoch (None: unknown)."""
        plan, self._steering = steering.plan(self._steering, remaining)
        return plan

    def lr_factor(self, size: int) -> float:
        """Return the factor on the learning rate; one batch as it comes counts as planned."""
        planned = max(self._steering.batch, self.settings.base)
        return steering.lr_factor(self._steering, min(size, planned))

    def measures_peaks(self, data: StepData) -> bool:
        """Whether this step's micro-batches are the first points of the memory line."""
        return self.step == 0 and len(data.sizes) > 1

    def learn(self, points: Sequence[tuple[int, float, int | None]], size: int) -> tuple[int, ...]:
        """Tell the policy of passes (samples, seconds, peak bytes) that trained nothing.

        Returns the cut that it then makes of the first step's `size` samples.
        """
        self._steering, changes = steering.rehearsed(self._steering, points)
        for change in changes:
            self.emit(change)
        return steering.recut(self._steering, size)

    # -- what a step gave --

    def took(self, result: StepResult, waited: float, size: int, seconds: float) -> None:
        """Take in one step: `waited` seconds for data of `seconds` in all, `size` samples."""
        self.step += 1
        self.samples += size
        self.in_epoch += size
        if self.schedule is not None:
            self.schedule.advance(self.in_epoch)
        if not self.probe.late:
            self._finish(self.step, self.samples, result, waited, seconds)
            return
        self._pending.append((self.step, self.samples, result, waited, seconds))
        self._read(LATE_STEPS if self.step_state.skip_on_device else 1)

    def _read(self, late: int) -> None:
        """Take in what the device was asked, but for the newest `late` steps."""
        while len(self._pending) > late:
            self._finish(*self._pending.popleft())

    def _finish(
        self, step: int, samples: int, result: StepResult, waited: float, seconds: float
    ) -> None:
        """Read a step's values, record it, and let the policy answer."""
        seen = read(result, self.probe)
        allocated, reserved = self._peaks(result)
        if self._sums is None:
            reduction = self.step_state.reduction
            self._sums = reduction is not None and reduction.kind == "sum"
            if self._sums:
                self._steering = steering.summed(self._steering)
            if reduction is not None and reduction.note:
                self.emit(NoteRecord(reduction.note))
        size = sum(result.sizes)
        loss = seen.loss / size if self._sums else seen.loss
        if not self._pinned:
            self._steer(step, result, seen, loss, allocated)
        if seen.skipped:
            self.run.skipped_steps += 1
        else:
            self.run.final_loss = loss
        self.emit(
            StepRecord(
                step, samples, loss, seen.norm, result.lr, size, max(result.sizes),
                len(result.sizes), seen.skipped, 0, waited, seen.forward_s, seen.backward_s,
                seen.optimizer_s, seconds, allocated, reserved, self._noise_scale, seen.logged,
            )
        )  # fmt: skip

    def _steer(
        self, step: int, result: StepResult, seen: Reading, loss: float, allocated: int | None
    ) -> None:
        """Tell the policy of a step and record what it changes."""
        self._steering, changes = steering.observe(
            self._steering,
            steering.StepFacts(
                step=step,
                sizes=tuple(result.sizes),
                loss=loss,
                grad_norm=seen.norm,
                skipped=seen.skipped,
                micro_seconds=seen.micro_s,
                optimizer_seconds=seen.optimizer_s,
                peaks=None if result.peaks is None else tuple(result.peaks),
                peak_bytes=allocated,
                pressure=allocated is not None and self.probe.pressure(),
                noise=seen.noise,
            ),
        )
        for change in changes:
            self.emit(change)
        if seen.noise is not None:
            self._noise_scale = steering.noise_scale(self._steering)

    def _peaks(self, result: StepResult) -> tuple[int | None, int | None]:
        allocated, reserved = self.probe.peak_if_due()
        if allocated is not None:
            self.probe.reset_peak()
        if result.peaks:
            allocated = max([allocated or 0, *(peak or 0 for peak in result.peaks)]) or None
        run = self.run
        if allocated is not None:
            run.peak_allocated_bytes = max(run.peak_allocated_bytes or 0, allocated)
        if reserved is not None:
            run.peak_reserved_bytes = max(run.peak_reserved_bytes or 0, reserved)
        return allocated, reserved

    # -- what a person asks --

    def obey(self) -> bool:
        """Do what was asked since the last step; return whether the run ends here.

        Raises:
            KeyboardInterrupt: the kernel was interrupted while the last step was made whole.
        """
        control = self._control
        if control is not None:
            if control.poll is not None:
                control.poll()
            if control.mail and requests.answer(self, control):
                return True
        if self.interrupts.hit:
            raise KeyboardInterrupt
        if self.step == self._steps or (
            self._seconds is not None and self._trained() >= self._seconds
        ):
            self.run.outcome = "finished"
            return True
        return False

    def by_hand(self, name: str, value: float | None) -> None:
        """Have the policy follow a setting, or "grow" or "shrink"."""
        self._steering, changes = steering.apply(self._steering, name, value, self.step)
        for change in changes:
            self.emit(change)

    def paused(self, seconds: float) -> None:
        """Leave `seconds` out of the run's training time."""
        self._not_training += seconds

    # -- epochs and the end --

    def begin_epoch(self, epoch: int) -> None:
        """Begin an epoch, counted from 0; the first one starts the clock."""
        self.epoch, self.in_epoch = epoch, 0
        if epoch == 0:
            self._begun = time.perf_counter()
            self.probe.reset_peak()

    def end_epoch(self, val: Any) -> bool:
        """Validate, advance the schedule, and return whether this was the last epoch."""
        metrics = None if val is None else self._validate(val)
        if self.schedule is not None:
            self.schedule.end_epoch(
                self.in_epoch, self.run.final_loss if metrics is None else metrics.get("loss")
            )
        if self._epochs is not None and self.epoch + 1 >= self._epochs:
            self.run.outcome = "finished"
            return True
        return False

    def _validate(self, val: Any) -> dict[str, float]:
        start = time.perf_counter()
        with self.interrupts.at_once():
            epoch = {"epoch": self.epoch + 1}
            metrics = epoch | evaluate(self.step_state, val) | epoch  # first, and never a mean
        taken = time.perf_counter() - start
        self._not_training += taken
        self.run.validation_seconds += taken
        self._validated = self.step
        self.emit(ValidationRecord(self.step, metrics))
        return metrics

    @contextlib.contextmanager
    def ending(self, val: Any = None) -> Iterator[None]:
        """Close the run's books on every way out, and make it the last run once it had begun."""
        run = self.run
        out_of_memory = False
        try:
            yield
            self._read(0)
            if val is not None and run.outcome == "finished" and self._validated < self.step:
                self._validate(val)  # the run ended inside an epoch
        except KeyboardInterrupt:
            run.outcome = "interrupted"
            self._read(0)
            raise
        except BaseException as error:
            run.outcome, run.error = "failed", f"{type(error).__name__}: {error}"
            self._pending.clear()
            out_of_memory = is_out_of_memory(error)
            if not out_of_memory:
                raise
        finally:
            run.steps, run.samples_seen = self.step, self.samples
            run.seconds = self._trained()
            if self.begun:
                runs.last_run = run
        if out_of_memory:  # told outside the handler, so that nothing holds the failed tensors
            raise HybridMagicError(self._out_of_memory)

    @property
    def _out_of_memory(self) -> str:
        size = self.run.history[-1].microbatch_size if self.run.history else self.feed.base
        return (
            f"out of memory on {self.probe.name} in step {self.step + 1}; wanted room for "
            f"micro-batches of {size} samples; try --micro {max(size // 2, 1)} (the global batch "
            "stays as it is), or a smaller --memory"
        )

    def _trained(self) -> float:
        """Return the seconds spent training so far: no validation, no pause."""
        return time.perf_counter() - self._begun - self._not_training if self._begun else 0.0

    # -- records --

    def emit(self, record: Record) -> None:
        self.run.add(record)
        if self._sink is not None:
            self._sink(record)

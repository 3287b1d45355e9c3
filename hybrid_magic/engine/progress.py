"""TrainState: where a run stands. Turns what steps gave into records and facts for the policy,
and requests into changes of the run.

Device values are read a step late where the device works ahead of the host, so that reading never
makes it wait. Trains nothing itself.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any

from ..config import TrainConfig
from ..policy.facts import Settings
from ..records import BatchChangeRecord, NoteRecord, Sink, StepRecord, ValidationRecord, both
from ..run import Run
from . import ranks, requests, together
from .control import RunControl
from .data import StepData
from .device import DeviceProbe
from .evaluate import evaluate
from .facts import Memory, facts_of
from .precision import Precision
from .prepare import Interrupts
from .reading import Reading, read
from .schedule import ScheduleClock
from .sizing import Sizing
from .step_state import StepResult, StepState

LATE_STEPS = 8  # how far reading may lag behind a device that decides for itself whether to skip


class TrainState:
    """All that changes while a run goes on, beside model and optimizer."""

    step_state: StepState
    schedule: ScheduleClock | None = None

    def __init__(
        self,
        run: Run,
        sink: Sink | None,
        control: RunControl | None,
        interrupts: Interrupts,
        config: TrainConfig,
        probe: DeviceProbe,
        settings: Settings,
        replay: Run | None = None,
    ) -> None:
        self.run, self.probe = run, probe
        self.step = self.samples = self.epoch = self.in_epoch = 0
        self.epoch_from = 0  # the steps before this epoch
        self.interrupts, self.obeyed = interrupts, control
        self.emit = both(run.add, sink)
        self.sizing = Sizing(settings, self.emit, None if replay is None else replay.sizes)
        self._precision_is_ours = config.precision == "auto" or (
            replay is not None and any(made.before == "fp16" for made in replay.changes)
        )
        self._epochs, self._steps = config.passes, config.steps
        self._seconds = None if config.minutes is None else 60 * config.minutes
        self.pending: deque[Any] = deque()  # what `_finish` takes
        self.at_end: Callable[[], None] = lambda: None  # called before the last of it is read
        self._begun = self._not_training = 0.0  # a moment; seconds of validation, of pauses
        self.noise_scale: float | None = None
        self.validated = 0
        self.sums: bool | None = None  # whether the loss is a sum over samples; known after a step
        self.epoch_loss = [0.0, 0]  # summed over the epoch's samples, and how many they are
        self.collapsed = False  # the loss scale fell below 1
        self.shares = 1  # processes that train
        self._larger = 0  # the largest micro-batch since memory was read

    # -- what a step gave --

    def measures_peaks(self, data: StepData) -> bool:
        """Whether this step's micro-batches are the first points of the memory line."""
        return self.step == 0 and len(data.sizes) > 1

    def took(self, result: StepResult, retries: int, waited: float, seconds: float) -> None:
        """Take in one step, which started over `retries` times and took `seconds`, of which it
        `waited` for data."""
        self._count(result.sizes, result.lr_factor)
        memory = self._memory(result, retries)  # the host's account: never late
        taken = (self.step, self.samples, result, memory, retries, waited, seconds)
        if not self.probe.late:
            self._finish(*taken)
            return
        self.pending.append(taken)
        self.catch_up(LATE_STEPS if self.step_state.skip_on_device else 1)

    def _count(self, sizes: list[int], lr_factor: float) -> None:
        """Count a step that is whole."""
        state, interrupts = self.step_state, self.interrupts
        found, interrupts.ending = interrupts.ending, True  # as `held`, in a quarter of its time
        try:
            self.in_epoch += state.samples - self.samples
            self.step, self.samples = state.steps, state.samples
            self.run.sizes.append(sizes, lr_factor)
            if self.schedule is not None:
                self.schedule.advance(self.in_epoch)
        finally:
            interrupts.ending = found

    def catch_up(self, late: int = 0) -> None:
        """Take in what the device was asked, but for the newest `late` steps."""
        while len(self.pending) > late:
            self._finish(*self.pending.popleft())

    def _finish(
        self,
        step: int,
        samples: int,
        result: StepResult,
        memory: Memory,
        retries: int,
        waited: float,
        seconds: float,
    ) -> None:
        """Read a step's values, record it, and let the policy answer."""
        seen, size = read(result, self.probe), sum(result.sizes)
        if self.sums is None:
            self._learn_reduction()
        loss = seen.loss / size if self.sums else seen.loss
        if not self.sizing.pinned:
            self._steer(step, result, seen, loss, memory)
        self.run.retries += retries
        if seen.skipped:
            self.run.skipped_steps += 1
            self._judge_scale(step)
        else:
            self.run.final_loss = loss
            self.epoch_loss[0] += loss * size
            self.epoch_loss[1] += size
        micro = -(-max(result.sizes) // self.shares)
        self.emit(
            StepRecord(
                step, samples, loss, seen.norm, result.lr, size, micro,
                len(result.sizes), seen.skipped, retries, waited, seen.forward_s, seen.backward_s,
                seen.optimizer_s, seconds, *memory[:2], self.noise_scale, seen.logged,
            )
        )  # fmt: skip

    def _learn_reduction(self) -> None:
        reduction = self.step_state.reduction
        if reduction is None:  # the next step tells
            return
        self.sums = reduction.kind == "sum"
        if self.sums:
            self.sizing.summed()
        if reduction.note:
            self.emit(NoteRecord(reduction.note))

    def _steer(
        self, step: int, result: StepResult, seen: Reading, loss: float, memory: Memory
    ) -> None:
        """Tell the policy of a step and record what it changes."""
        group = self.step_state.together
        self.sizing.observe(facts_of(step, result, seen, loss, memory, group))
        if seen.noise is not None:
            self.noise_scale = self.sizing.noise_scale

    def _judge_scale(self, step: int) -> None:
        """Say that the model does not train in fp16 where the loss scale falls below 1; go on in
        fp32 where the precision was ours to choose."""
        state = self.step_state
        scaler = state.precision.scaler
        if scaler is None or self.collapsed or scaler.get_scale() >= 1:
            return
        self.collapsed = True
        why = f"its loss or gradients overflow even at a loss scale of {scaler.get_scale():g}"
        if self._precision_is_ours:
            state.precision = Precision("fp32", self.probe.device)
            reason = f"this model does not train in fp16: {why}; going on in fp32"
            self.emit(BatchChangeRecord(step, "fp16", "fp32", "precision", reason))
        else:
            advice = "stop, and use --precision bf16 or fp32 (and look for NaN in the data)"
            self.emit(NoteRecord(f"this model does not train in fp16: {why}; {advice}"))

    def _memory(self, result: StepResult, retries: int) -> Memory:
        largest = max(result.sizes)
        self._larger = max(self._larger, largest + (retries > 0))  # tried since the last reading
        allocated, reserved = self.probe.peak_if_due()
        if pressed := allocated is not None:
            pressed = self.probe.pressure()
            self.probe.reset_peak()
            self._note_peak(allocated, reserved)
            if self._larger > largest:  # it is that of a larger size
                allocated = reserved = None
            self._larger = 0
        if result.peaks:
            allocated = max([allocated or 0, *(peak or 0 for peak in result.peaks)]) or None
        self._note_peak(allocated, reserved)
        return allocated, reserved, pressed

    def _note_peak(self, allocated: int | None, reserved: int | None) -> None:
        run = self.run
        run.peak_allocated_bytes = max(run.peak_allocated_bytes or 0, allocated or 0) or None
        run.peak_reserved_bytes = max(run.peak_reserved_bytes or 0, reserved or 0) or None

    # -- what a person asks --

    def obey(self) -> bool:
        """Do what was asked since the last step; return whether the run ends here.

        Raises:
            KeyboardInterrupt: the kernel was interrupted while the last step was made whole.
        """
        control = self.obeyed
        if control is not None:
            if control.poll is not None:
                control.poll()
            if control.mail and requests.answer(self, control):
                return True
        group = ranks.current()
        if self.interrupts.hit if group is None else group.agreed.come_to_interrupt():
            raise KeyboardInterrupt
        if self.step == self._steps or (self.late if group is None else group.agreed.over):
            self.run.outcome = "finished"
            return True
        return False

    @property
    def late(self) -> bool:
        """Whether the minutes are over that were asked for."""
        return self._seconds is not None and self.trained() >= self._seconds

    def paused(self, seconds: float) -> None:
        """Leave `seconds` out of the run's training time."""
        self._not_training += seconds

    # -- epochs and the end --

    def begin_epoch(self, epoch: int) -> None:
        """Begin an epoch, counted from 0; the first one starts the clock."""
        if epoch != self.epoch or not self.in_epoch:  # it is not one that is gone on with
            self.epoch, self.in_epoch, self.epoch_loss = epoch, 0, [0.0, 0]
            self.epoch_from = self.step
        if not self._begun:
            self._begun = time.perf_counter()
            self.probe.reset_peak()

    def end_epoch(self, val: Any) -> bool:
        """Validate, advance the schedule, and return whether this was the last epoch."""
        metrics = None if val is None else self._validate(val)
        if self.schedule is not None and self.schedule.judges:
            self.catch_up()
        total, n = self.epoch_loss
        with self.interrupts.held():
            if self.schedule is not None:
                self.schedule.end_epoch(self.in_epoch, total / n if n else None, metrics)
            self.epoch, self.in_epoch = self.epoch + 1, 0
        if self._epochs is not None and self.epoch >= self._epochs:
            self.run.outcome = "finished"
            return True
        return False

    def _validate(self, val: Any) -> dict[str, float]:
        start = time.perf_counter()
        with self.interrupts.interruptible():
            epoch = {"epoch": self.epoch + 1}
            metrics = epoch | evaluate(self.step_state, val) | epoch  # first, and never a mean
        self._note_peak(*self.probe.peak())
        self.probe.reset_peak()  # it is no step's
        taken = time.perf_counter() - start
        self._not_training += taken
        self.run.validation_seconds += taken
        self.validated = self.step
        self.emit(ValidationRecord(self.step, metrics))
        return metrics

    def finish(self, val: Any) -> None:
        """Read what is left, and validate where the run ended inside an epoch."""
        self.at_end()
        self.catch_up()
        if val is not None and self.run.outcome == "finished" and self.validated < self.step:
            self._validate(val)

    def close_books(self, error: BaseException | None) -> None:
        """Write down how the run ended, by `error` where it is not None."""
        run, state = self.run, self.step_state
        together.ended_by(error)
        if state.steps > self.step:  # interrupted between its last step and this
            self._count(*state.newest)
        if isinstance(error, KeyboardInterrupt):
            run.outcome = "interrupted"
        elif error is not None:
            run.outcome, run.error = "failed", f"{type(error).__name__}: {error}"
            self.pending.clear()  # the device may not answer any more
        run.steps, run.samples_seen = state.steps, state.samples
        run.seconds = self.trained()
        self.at_end()
        self.catch_up()

    def trained(self) -> float:
        """Return the seconds spent training so far: no validation, no pause."""
        return time.perf_counter() - self._begun - self._not_training if self._begun else 0.0
